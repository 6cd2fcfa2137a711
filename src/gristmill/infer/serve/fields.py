"""The settings of a request's JSON object, read one by one with their kinds and bounds."""

from __future__ import annotations

from typing import Any

import orjson

_MISSING: Any = object()


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Keep what the answer says."""
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = headers or {}


class Fields:
    """The settings of a request, each taken once; null is as good as absent."""

    def __init__(self, body: bytes) -> None:
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refused(f"the request is no JSON ({error}).") from None
        if not isinstance(content, dict):
            raise Refused(
                f"the request must be a JSON object, not {_kind(content)}.", code="invalid_json"
            )
        self._left = {key: value for key, value in content.items() if value is not None}
        # What clients say about themselves and about where to compute changes no reply.
        for name in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
            self._left.pop(name, None)
        self.only("service_tier", "auto", "default")

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a setting, of whatever kind."""
        value = self._left.pop(name, default)
        if value is _MISSING:
            raise Refused(f"{name} is missing.", param=name)
        return value

    def text(self, name: str, default: str) -> str:
        """The value of a setting that is a text."""
        value = self.take(name, default)
        if not isinstance(value, str):
            raise Refused(f"{name} must be a text (got {_kind(value)}).", param=name)
        return value

    def flag(self, name: str) -> bool:
        """The value of a setting that is true or false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise Refused(f"{name} must be true or false (got {_kind(value)}).", param=name)
        return value

    def whole(
        self, name: str, default: Any, *, low: int | None = None, high: int | None = None
    ) -> Any:
        """The value of a setting that is a whole number; an absent one is `default`."""
        value = self.take(name, None)
        if value is None:
            return default
        if not is_whole(value):
            raise Refused(f"{name} must be a whole number (got {_kind(value)}).", param=name)
        self._within(name, value, low, high)
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """The value of a setting that is a number."""
        value = self.take(name, default)
        if not is_number(value):
            raise Refused(f"{name} must be a number (got {_kind(value)}).", param=name)
        self._within(name, value, low, high)
        return float(value)

    def only(self, name: str, *values: Any) -> None:
        """Refuse a setting unless it says what is done anyway."""
        if name in self._left and self._left.pop(name) not in values:
            raise Refused(f"{name} is not supported by this server.", param=name)

    def end(self) -> None:
        """Refuse what is left: settings that are unknown."""
        if self._left:
            names = ", ".join(sorted(self._left)[:10])
            raise Refused(f"unknown setting ({names[:300]}).", param=min(self._left)[:100])

    @staticmethod
    def _within(name: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"{low} or more" if high is None else f"from {low} to {high}"
            raise Refused(f"{name} must be {span} (got {value}).", param=name)


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), str(value)[:40])

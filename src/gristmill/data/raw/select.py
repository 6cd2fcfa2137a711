"""Which records are kept: filters declared as data, and a function of the user's own."""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gristmill.util.errors import RunError, UserError
from gristmill.util.named import load_named

MISSING = object()
"""What a filter sees where a record has no such field."""

Test = Callable[[Any], bool]
Map = Callable[[list[str]], "list[str | None]"]

_OPERATORS = ("in", "not_in", "min", "max")
_EXAMPLE = """for example --filter '{"meta.lang": "en", "score": {"min": 0.5}}'"""


@dataclass(frozen=True)
class Rule:
    """What one field of a record must be."""

    field: str
    tests: tuple[Test, ...]

    def keeps(self, value: Any) -> bool:
        """Whether a record with this value, or `MISSING`, is kept."""
        return all(test(value) for test in self.tests)


@dataclass(frozen=True)
class Selection:
    """Filters of records; a record is kept when every one of them keeps it."""

    rules: tuple[Rule, ...]

    @classmethod
    def from_settings(cls, filters: Mapping[str, Any]) -> Selection:
        """The selection that {"a.b": value or {"in"|"not_in": [...], "min"|"max": x}} declares.

        A record without the field is kept by not_in and left out by the others. Raises UserError.
        """
        return cls(tuple(Rule(str(field), _tests(str(field), v)) for field, v in filters.items()))

    @property
    def fields(self) -> set[str]:
        """The fields that are looked at."""
        return {rule.field for rule in self.rules}

    def keep(self, record: dict[str, Any]) -> bool:
        """Whether the record is kept."""
        return all(rule.keeps(look_up(record, rule.field)) for rule in self.rules)


def look_up(record: Any, field: str) -> Any:
    """The value of a field, nested ones as a.b, or `MISSING`; a field called "a.b" comes first."""
    if type(record) is not dict:
        return MISSING
    if field in record:
        return record[field]
    outer, _, inner = field.partition(".")
    while inner:
        if outer in record:
            found = look_up(record[outer], inner)
            if found is not MISSING:
                return found
        step, _, inner = inner.partition(".")
        outer = f"{outer}.{step}"
    return MISSING


def _tests(field: str, wanted: Any) -> tuple[Test, ...]:
    if not isinstance(wanted, dict):
        if isinstance(wanted, list | tuple):
            raise UserError(
                f"the filter of {field!r} is a list. "
                f'write {{"{field}": {{"in": [...]}}}}: {_EXAMPLE}.'
            )
        return (_is_in(field, [wanted]),)
    unknown = [name for name in wanted if name not in _OPERATORS]
    if unknown or not wanted:
        raise UserError(
            f"the filter of {field!r} has {'no' if not wanted else 'an unknown'} operator "
            f"{', '.join(map(repr, unknown))}".rstrip()
            + f". use {', '.join(_OPERATORS)}: {_EXAMPLE}."
        )
    makers = {"in": _is_in, "not_in": _is_not_in, "min": _is_at_least, "max": _is_at_most}
    return tuple(makers[name](field, value) for name, value in wanted.items())


def _keys(field: str, values: Any) -> frozenset[Any]:
    if not isinstance(values, list | tuple):
        raise UserError(
            f"the filter of {field!r} needs a list of values, not {values!r}. {_EXAMPLE}."
        )
    try:
        return frozenset(map(_key, values))
    except TypeError:
        raise UserError(
            f"the filter of {field!r} compares with {values!r}. "
            f"compare with texts, numbers, true, false or null: {_EXAMPLE}."
        ) from None


def _key(value: Any) -> Any:
    # In Python True equals 1; in data they are different.
    return ("bool", value) if type(value) is bool else value


def _is_in(field: str, values: Any) -> Test:
    keys = _keys(field, values)

    def test(value: Any) -> bool:
        return not isinstance(value, list | dict) and _key(value) in keys

    return test


def _is_not_in(field: str, values: Any) -> Test:
    is_in = _is_in(field, values)
    return lambda value: not is_in(value)


def _bound(field: str, bound: Any) -> tuple[type, ...]:
    """The types that can be compared with the bound."""
    if isinstance(bound, str):
        return (str,)
    if isinstance(bound, int | float) and not isinstance(bound, bool):
        return (int, float)
    raise UserError(
        f"the filter of {field!r} has the bound {bound!r}. give a number or a text: {_EXAMPLE}."
    )


def _is_at_least(field: str, bound: Any) -> Test:
    kinds = _bound(field, bound)
    return lambda value: type(value) in kinds and value >= bound


def _is_at_most(field: str, bound: Any) -> Test:
    kinds = _bound(field, bound)
    return lambda value: type(value) in kinds and value <= bound


def load_map(spec: str) -> Map:
    """The user's function `module:function`: a list of texts in, one entry for each text out.

    The entries are texts, or None where a document is left out. The function itself may also give
    True (keep) and False (leave out). Raises UserError when there is no such function; a call
    raises RunError, naming it, where it fails or answers with another length or kind.
    """
    return _checked(spec, _imported(spec))


def map_digest(spec: str) -> str | None:
    """What tells whether the user's function is still the same: a digest of its source.

    None where it has none, such as one made at run time. What it calls is not looked at.
    """
    function = _imported(spec)
    try:
        source = inspect.getsource(function if hasattr(function, "__name__") else type(function))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:16]


def _checked(spec: str, function: Callable[[list[str]], Sequence[Any]]) -> Map:
    def mapped(texts: list[str]) -> list[str | None]:
        try:
            answers = function(list(texts))
        except Exception as error:  # whatever a function of the user's does
            raise _failed(spec, error) from error
        if hasattr(answers, "tolist"):
            answers = answers.tolist()
        if not isinstance(answers, list | tuple) or len(answers) != len(texts):
            given = len(answers) if isinstance(answers, list | tuple) else type(answers).__name__
            raise RunError(
                f"--map {spec} answered {len(texts)} texts with {given}. "
                "it must return a list with one entry for each text."
            )
        return [_answer(spec, text, a) for text, a in zip(texts, answers, strict=True)]

    return mapped


def _failed(spec: str, error: Exception) -> RunError:
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return RunError(
        f"--map {spec} failed ({what}; {place.filename}, line {place.lineno}). mend it and run the "
        "same command again: what is done is kept."
    )


def _answer(spec: str, text: str, answer: Any) -> str | None:
    if type(answer) is str:
        return answer
    if answer is None or answer is False:
        return None
    if answer is True:
        return text
    raise RunError(
        f"--map {spec} returned {type(answer).__name__} for a text. "
        "each entry must be a text, True, False or None."
    )


def _imported(spec: str) -> Callable[[list[str]], Sequence[Any]]:
    function = load_named("--map", spec, "function")
    if not callable(function):
        raise UserError(
            f"--map {spec} is no function but {type(function).__name__}. give module:function."
        )
    return cast("Callable[[list[str]], Sequence[Any]]", function)

"""Texts that end a reply, found as the reply comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Lets a text through up to the first of `stops`, whichever way it is cut into pieces.

    What could be the beginning of a stop is withheld until the next pieces settle it. The stop
    itself and all that follows are never shown. Of several stops the one that is complete first
    ends the text; of those that are complete at once, the longest. Empty stops are none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def put(self, piece: str) -> str:
        """The text that may be shown now, perhaps empty; after a stop always empty."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:
            end, length = min(found)
            self.stopped = True
            self._held = ""
            return text[: end + length]
        shown = len(text) - self._num_withheld(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text still withheld, at the end of a reply that no stop ended."""
        rest, self._held = self._held, ""
        return rest

    def _num_withheld(self, text: str) -> int:
        """Length of the longest end of `text` that one of the stops begins with."""
        return max((_num_begun(stop, text) for stop in self._stops), default=0)


def _num_begun(stop: str, text: str) -> int:
    """How much of `stop`, which `text` does not have, is at the end of the text."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0

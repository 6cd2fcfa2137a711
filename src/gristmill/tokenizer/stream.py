"""Text from tokens as they come, for streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character has at most four bytes, hence four tokens: one still incomplete after more is broken.
_MAX_HELD = 8


class StreamDecoder:
    """Turns tokens into text one by one; the parts joined are the decoding of all tokens.

    A character that needs several tokens comes with its last one. Each step decodes a short window
    that starts with tokens already shown, so that the leading space that SentencePiece drops from
    the start of a text is dropped once and not at every step.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text is out

    def put(self, token: int) -> str:
        """The text that `token` completes, perhaps empty."""
        self._window.append(token)
        text = self._new_text()
        held = len(self._window) - self._num_shown
        if not text or (text.endswith("\ufffd") and held <= _MAX_HELD):
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text

    def flush(self) -> str:
        """The text still held back (a broken character is U+FFFD); the decoder starts anew."""
        text = self._new_text()
        self._window = []
        self._num_shown = 0
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._window[: self._num_shown])
        return self._decode(self._window)[len(shown) :]

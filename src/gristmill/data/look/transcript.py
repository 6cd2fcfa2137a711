"""Tokens as a person reads them: the text between special tokens, which are marked.

    ⟦…⟧   something that is not text: a special token, an id without a token, a control character

Text that happens to look like a special token stays plain, and so shows what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gristmill.data.look.page import Part
from gristmill.tokenizer.tokenizer import Tokenizer

SPECIAL, ODD, EDGE = "bold black on yellow", "black on cyan", "bold magenta"
"""Styles of special tokens, of characters that do not print, and of document boundaries."""

# Control characters would act on the terminal, directions and the marks themselves would mislead.
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u27e6\u27e7\ufffd]")
_LINE = re.compile(r"(\n)")


class Transcript:
    """Shows tokens with a tokenizer, or as ids where there is none."""

    def __init__(
        self, tokenizer: Tokenizer | None, frame: Sequence[int | None] = (None, None)
    ) -> None:
        self._tokenizer = tokenizer
        self._special: dict[int, str] = {}
        if tokenizer is not None:
            self._special = {number: text for text, number in tokenizer.backend.special.items()}
        for number in frame:
            # What the dataset puts around documents is marked, whatever the tokenizer says of it.
            if number is not None and number not in self._special:
                self._special[number] = self._name(number)

    def parts(self, ids: Sequence[int]) -> Iterator[Part]:
        """Text and marks of the tokens, in order."""
        if self._tokenizer is None:
            yield " ".join(map(str, ids))
            return
        begin = 0
        for place, number in enumerate(ids):
            known = number in self._special
            if known or not self._is_token(number):
                yield from self._text(ids[begin:place])
                yield f"⟦{self._special[number]}⟧" if known else f"⟦id {number}⟧", SPECIAL
                begin = place + 1
        yield from self._text(ids[begin:])

    def is_special(self, number: int) -> bool:
        """Whether the id is marked, not read."""
        return number in self._special

    def piece(self, number: int) -> list[Part]:
        """One token on its own, spaces and line breaks visible."""
        if self._tokenizer is None:
            return []
        if self.is_special(number):
            return [(f"⟦{self._special[number]}⟧", SPECIAL)]
        text = self._tokenizer.decode([number], skip_special=False)
        if "\ufffd" in text or not text:
            # A part of a character, or a space that only shows between others.
            return [repr(self._name(number))]
        return [repr(text)]

    def _text(self, ids: Sequence[int]) -> Iterator[Part]:
        if not ids:
            return
        assert self._tokenizer is not None
        text = self._tokenizer.decode(ids, skip_special=False)
        begin = 0
        for odd in _ODD.finditer(text):
            yield text[begin : odd.start()]
            yield f"⟦U+{ord(odd[0]):04X}⟧", ODD
            begin = odd.end()
        yield text[begin:]

    def _is_token(self, number: int) -> bool:
        assert self._tokenizer is not None
        return 0 <= number < self._tokenizer.num_token_ids and bool(self._name(number))

    def _name(self, number: int) -> str:
        if self._tokenizer is None:
            return str(number)
        return self._tokenizer.backend.token_text(number) or ""


def cut(parts: Iterator[Part], most: int) -> tuple[list[Part], bool]:
    """The parts up to `most` characters (0: all), and whether something was left out."""
    kept: list[Part] = []
    room = most
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        if most and len(text) > room:
            # A mark is shown whole or not at all.
            if not style and room:
                kept.append((text[:room], style))
            return kept, True
        kept.append((text, style))
        room -= len(text)
    return kept, False


def lines(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts as lines, broken where the text is."""
    line: list[Part] = []
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        for piece in _LINE.split(text):
            if piece == "\n":
                yield line
                line = []
            elif piece:
                line.append((piece, style))
    if line:
        yield line

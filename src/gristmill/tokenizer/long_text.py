"""Encoding of long documents and large batches in bounded memory, with the same ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

# (ids uint32[N], offsets int64[n + 1]): text i is ids[offsets[i]:offsets[i + 1]].
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
EncodeBatch = Callable[[list[str]], Encoded]

# Hugging Face tokenizers need 100 to 200 bytes of memory per byte of text in one call. Calls this
# large are also the fastest ones of fastokens: three times faster than one call of 12 MB.
MAX_CALL_BYTES = 256_000
MAX_TEXT_BYTES = 1_000_000

MAX_UNCUT_BYTES = 6 << 20
"""A stretch of text without a place to cut that is longer than this is not encoded at all."""

Mark = Literal["\n", " "]


@dataclass(frozen=True)
class _Rule:
    """A place where a text may be cut: so many characters after the pattern begins."""

    mark: Mark
    pattern: re.Pattern[str]
    after: int
    dropped: int = 0
    """Characters after the place that are left out: the space that the tokenizer itself puts
    before a text."""


# A newline between a visible character and a letter. With white space before the newline, GPT-2's
# expression takes a run of it differently when nothing follows.
_LINE = re.compile(r"\n(?<=\S\n)(?=[^\W\d_])")
# Before a single space that begins a word.
_WORD = re.compile(r" (?<=\S )(?=[^\W\d_])")
# Both begin with the mark itself: such a pattern is found ten times as fast.
# In this order: words are for texts without lines, and for tokenizers that know none.
_RULES = (_Rule("\n", _LINE, 1), _Rule(" ", _WORD, 0), _Rule(" ", _WORD, 0, dropped=1))

# Byte-level tokenizers write the bytes that are no visible character of Latin-1 as U+0100 and on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SHIFTED = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(_SHIFTED)}
_SPACE_INSIDE = re.compile(r"\S ")
_GLANCES: dict[Mark, Callable[[str], object]] = {
    "\n": re.compile("[\n\u010a].", re.DOTALL).search,
    " ": re.compile(".[ \u2581\u0120]", re.DOTALL).search,
}

_BEGINNING = 1_000
_LOOKED_AT_ONE_IN = 32

_BEFORE = (
    *("a", "Z", "7", "12", "1234", ".", ";", "){", "'", "it's", "_", "\\", "$", "a b", "if x:"),
    *("é", "e\u0301", "中", "한", "ก็", "हिन्दी", "🙂", "👩\u200d👧", "…", "“"),
    *("\x00", "\u200b", "\ufeffq", "x\n\ny"),
)
_AFTER = ("a", "B", "s'", "é", "É", "中", "и", "ש", "ع", "ǅ", "\u1100\u1161", "가", "ª", "ﬁ", "ßx")


class TooLong(ValueError):
    """A text that cannot be encoded in bounded memory."""


class Cutter:
    """Cuts long texts where the tokenizer provably starts anew, or not at all.

    `encode` is the tokenizer's definition; `parts_at()` tells the marks that, by its vocabulary and
    its way of working, no token can reach over: a newline before a letter, or a space after a
    visible character. Texts are cut there only if probes too encode alike whole and cut, and the
    beginning of one text in 32 as well.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], parts_at: Callable[[], set[Mark]]
    ) -> None:
        self._encode = encode
        self._parts_at = parts_at

    @cached_property
    def _rules(self) -> tuple[_Rule, ...]:
        """The rules that hold; found out when the first long text comes."""
        known = self._parts_at()
        found: list[_Rule] = []
        for rule in _RULES:
            new = all(rule.mark != other.mark for other in found)
            if (
                new
                and rule.mark in known
                and all(self._same(t, (rule,)) for t in _probes(rule.mark))
            ):
                found.append(rule)
        return tuple(found)

    def pieces(self, text: str) -> list[str]:
        """`text` in pieces whose encodings, one after another, are the encoding of `text`."""
        if size(text) <= MAX_TEXT_BYTES or not (rules := self._rules_for(text)):
            return [text]
        return [text[a:b] for a, b in _cut(text, _step(text), rules)]

    def fits(self, text: str) -> bool:
        """Whether `text` can be encoded in bounded memory."""
        return utf8_size(text) <= MAX_UNCUT_BYTES or all(
            utf8_size(piece) <= MAX_UNCUT_BYTES for piece in self.pieces(text)
        )

    def streamed(self, pieces: Iterable[str]) -> Iterator[str]:
        """The text that the given pieces make, in pieces as `pieces` gives.

        Raises TooLong where it holds too long a stretch without a place to cut.
        """
        rules: tuple[_Rule, ...] | None = None
        held = ""
        for piece in pieces:
            held += piece
            if rules is None and len(held) < _BEGINNING:
                continue
            if rules is None:
                rules = self._rules_for(held)
            start = 0
            if rules:
                *whole, (start, _) = _cut(held, _step(held), rules)
                yield from (held[a:b] for a, b in whole)
            held = held[start:]
            if 3 * len(held) > MAX_UNCUT_BYTES and utf8_size(held) > MAX_UNCUT_BYTES:
                raise TooLong
        if held:
            yield held

    def _rules_for(self, text: str) -> tuple[_Rule, ...]:
        """The rules for one text, a few of which, chosen by content, are looked at themselves."""
        beginning = text[:_BEGINNING]
        hashed = xxhash.xxh3_64_intdigest(beginning.encode("utf-8", "replace"))
        if hashed % _LOOKED_AT_ONE_IN and self._rules:
            return self._rules
        return self._rules if self._same(beginning, self._rules) else ()

    def _same(self, text: str, rules: Sequence[_Rule]) -> bool:
        """Whether `text` has the same ids when it is cut wherever that is allowed."""
        if not rules:
            return False
        cut = [token for a, b in _cut(text, 1, rules) for token in self._encode(text[a:b])]
        return cut == self._encode(text)


def _probes(mark: Mark) -> Iterator[str]:
    for before in _BEFORE:
        yield mark.join(f"{after} {before}" for after in _AFTER)
        yield mark.join(f"{after}{before}" for after in _AFTER)
    yield mark.join(f"{after}{before}" for after in _AFTER for before in _BEFORE)


def _step(text: str) -> int:
    return MAX_CALL_BYTES if text.isascii() else MAX_CALL_BYTES // 3


def _cut(text: str, step: int, rules: Sequence[_Rule]) -> Iterator[tuple[int, int]]:
    """Where pieces of about `step` characters or more begin and end."""
    start = 0
    while (found := _next_place(text, start + step, max(step, 100), rules)) is not None:
        end, dropped = found
        yield start, end
        start = end + dropped
    yield start, len(text)


def _next_place(text: str, at: int, window: int, rules: Sequence[_Rule]) -> tuple[int, int] | None:
    """A place to cut at or after `at`, by the first rule that has one nearby."""
    while at < len(text):
        for rule in rules:
            # A place two characters before the end of the window still has its letter in it.
            for match in rule.pattern.finditer(text, max(at - 2, 0), at + window + 2):
                end = match.start() + rule.after
                if end >= at and text[end + (rule.mark == " ")].isalpha():
                    return end, rule.dropped
        at += window
    return None


def marks_within(tokens: Collection[str]) -> set[Mark]:
    """The marks that some entry of a vocabulary reaches over; see `reaches_over`."""
    # Most entries are done with at a glance.
    return {
        mark
        for mark, glance in _GLANCES.items()
        if any(reaches_over(token, mark) for token in tokens if glance(token))
    }


def reaches_over(token: str, mark: Mark) -> bool:
    """Whether a vocabulary entry holds a newline and a letter after it, or a space in it.

    The entry is read as plain text, with U+2581 as a space, and as the bytes it may stand for; a
    part of a character counts as a letter.
    """
    readings = [token.replace("\u2581", " ")]
    if all(char in _BYTE_OF for char in token):
        readings.append(bytes(_BYTE_OF[char] for char in token).decode("utf-8", "replace"))
    if mark == " ":
        return any(_SPACE_INSIDE.search(text) for text in readings)
    following = (text[at + 1] for text in readings for at in _newlines(text[:-1]))
    return any(char.isalpha() or char == "\ufffd" for char in following)


def _newlines(text: str) -> list[int]:
    return [index for index, char in enumerate(text) if char == "\n"] if "\n" in text else []


def utf8_size(text: str) -> int:
    """The bytes of `text`."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def size(text: str) -> int:
    """An upper estimate of the bytes of `text`, without encoding it."""
    return len(text) if text.isascii() else 3 * len(text)


def encode_bounded(texts: Sequence[str], encode: EncodeBatch, cutter: Cutter) -> Encoded:
    """The ids of all texts and where each text's begin, from calls of bounded size.

    Returns (ids uint32[N], offsets int64[len(texts) + 1]). `encode` sees lists of at most about
    `MAX_CALL_BYTES`, or one text up to `MAX_TEXT_BYTES`, or a longer one that must not be cut.
    """
    if sum(map(len, texts)) <= MAX_CALL_BYTES:
        return encode(list(texts))
    parts: list[NDArray[np.uint32]] = []
    lengths = np.zeros(len(texts), dtype=np.int64)
    for owners, batch in _calls(texts, cutter):
        ids, offsets = encode(batch)
        parts.append(ids)
        np.add.at(lengths, owners, np.diff(offsets))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.concatenate(parts) if len(parts) != 1 else parts[0]
    return ids.astype(np.uint32, copy=False), offsets


def _calls(texts: Iterable[str], cutter: Cutter) -> Iterator[tuple[list[int], list[str]]]:
    """Lists of pieces for one call each, with the index of the text that each belongs to."""
    owners: list[int] = []
    batch: list[str] = []
    num_bytes = 0
    for index, text in enumerate(texts):
        for piece in cutter.pieces(text):
            if batch and num_bytes + size(piece) > MAX_CALL_BYTES:
                yield owners, batch
                owners, batch, num_bytes = [], [], 0
            owners.append(index)
            batch.append(piece)
            num_bytes += size(piece)
    yield owners, batch


def without_surrogates(text: str) -> str:
    """`text` with lone surrogates, which no encoding of Unicode can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def flat(lists: Iterable[list[int]]) -> Encoded:
    """Lists of ids as one array, and where each begins."""
    lists = list(lists)
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    values = itertools.chain.from_iterable(lists)
    return np.fromiter(values, dtype=np.uint32, count=int(offsets[-1])), offsets

"""Encoding of long documents and large batches in bounded memory, with the same ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# (ids uint32[N], offsets int64[n + 1]): text i is ids[offsets[i]:offsets[i + 1]].
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
EncodeBatch = Callable[[list[str]], Encoded]

# Hugging Face tokenizers need 100 to 200 bytes of memory per byte of text in one call. Calls this
# large are also the fastest ones of fastokens: three times faster than one call of 12 MB.
MAX_CALL_BYTES = 256_000
MAX_TEXT_BYTES = 1_000_000

# A newline between a visible character and a letter. With white space before the newline, GPT-2's
# expression takes a run of it differently when nothing follows.
_CUT = re.compile(r"\S\n(?=[^\W\d_])")

_BEFORE = (
    *("a", "Z", "7", "12", "1234", ".", ";", "){", "'", "it's", "_", "\\", "$", "a b", "if x:"),
    *("é", "e\u0301", "中", "한", "ก็", "हिन्दी", "🙂", "👩\u200d👧", "…", "“"),
    *("\x00", "\u200b", "\ufeffq", "x\n\ny"),
)
_AFTER = ("a", "B", "s'", "é", "É", "中", "и", "ש", "ع", "ǅ", "\u1100\u1161", "가", "ª", "ﬁ", "ßx")


class LongText:
    """Cuts long texts where the tokenizer provably starts anew, or not at all.

    `encode` is the tokenizer's definition; `spans_line()` tells whether some token of its
    vocabulary holds a newline followed by a letter. A cut is made only when no token does, when
    probes encode alike whole and cut, and when the beginning of the document itself does.
    """

    def __init__(self, encode: Callable[[str], list[int]], spans_line: Callable[[], bool]) -> None:
        self._encode = encode
        self._spans_line = spans_line
        self._cuts_safely: bool | None = None  # found out when the first long text comes

    def pieces(self, text: str) -> list[str]:
        """`text` in pieces whose encodings, one after another, are the encoding of `text`."""
        if size(text) <= MAX_TEXT_BYTES or not self._safe_for(text):
            return [text]
        step = MAX_CALL_BYTES if text.isascii() else MAX_CALL_BYTES // 3
        return list(_cut(text, step))

    def _safe_for(self, text: str) -> bool:
        if self._cuts_safely is None:
            self._cuts_safely = not self._spans_line() and all(map(self._same, _probes()))
        return self._cuts_safely and self._same(text[:8_000])

    def _same(self, text: str) -> bool:
        """Whether `text` has the same ids when it is cut wherever that is allowed."""
        cut = [token for piece in _cut(text, 1) for token in self._encode(piece)]
        return cut == self._encode(text)


def _probes() -> Iterator[str]:
    for before in _BEFORE:
        yield "\n".join(f"{after} {before}" for after in _AFTER)
    yield "\n".join(f"{after}{before}" for after in _AFTER for before in _BEFORE)


def _cut(text: str, step: int) -> Iterator[str]:
    """`text` in pieces of about `step` characters, each but the last ending in a newline."""
    start = 0
    for match in _CUT.finditer(text, min(max(step - 2, 0), len(text))):
        end = match.end()
        if end - start >= step and text[end].isalpha():
            yield text[start:end]
            start = end
    yield text[start:]


def size(text: str) -> int:
    """An upper estimate of the bytes of `text`, without encoding it."""
    return len(text) if text.isascii() else 3 * len(text)


def encode_bounded(texts: Sequence[str], encode: EncodeBatch, long_text: LongText) -> Encoded:
    """The ids of all texts and where each text's begin, from calls of bounded size.

    Returns (ids uint32[N], offsets int64[len(texts) + 1]). `encode` sees lists of at most about
    `MAX_CALL_BYTES`, or one text up to `MAX_TEXT_BYTES`, or a longer one that must not be cut.
    """
    parts: list[NDArray[np.uint32]] = []
    lengths = np.zeros(len(texts), dtype=np.int64)
    for owners, batch in _calls(texts, long_text):
        ids, offsets = encode(batch)
        parts.append(ids)
        np.add.at(lengths, owners, np.diff(offsets))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.concatenate(parts) if len(parts) != 1 else parts[0]
    return ids.astype(np.uint32, copy=False), offsets


def _calls(texts: Iterable[str], long_text: LongText) -> Iterator[tuple[list[int], list[str]]]:
    """Lists of pieces for one call each, with the index of the text that each belongs to."""
    owners: list[int] = []
    batch: list[str] = []
    num_bytes = 0
    for index, text in enumerate(texts):
        for piece in long_text.pieces(text):
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

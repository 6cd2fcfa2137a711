"""The documents of one side of a unit: gathered in blocks, shuffled, written as chunk files.

Memory is bounded by a block and a chunk, not by the unit or by any document. A document longer
than a chunk is cut: its chunks but the last say that they continue.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.data.reading import order
from gristmill.data.store.chunks import ChunkRecord, write_chunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tokens = NDArray[Any]
    Int64s = NDArray[np.int64]

# Documents are shuffled among this many tokens.
_BLOCK_TOKENS = 2**25
# Documents that are longer on average are framed one by one.
_LONG_TOKENS = 300
_DOCUMENTS = 3  # what the shuffle's key is for; see order.py


@dataclass
class _Mark:
    """What a side was before a long document."""

    documents: int
    parts: int
    open: list[Tokens]
    open_lengths: list[Int64s]
    open_tokens: int


@dataclass
class Side:
    """Takes the documents of one split of a unit and writes `<name>-<n>.bin` files."""

    folder: Path
    name: str
    dtype: str
    chunk_tokens: int
    seed: int
    key: tuple[int, int]
    """Unit and number of the split, for the shuffle."""
    documents: int = 0
    parts: list[ChunkRecord] = field(default_factory=list)
    _blocks: int = 0
    _gathered: list[Tokens] = field(default_factory=list)
    _gathered_lengths: list[Int64s] = field(default_factory=list)
    _num_gathered: int = 0
    # The chunk that is being filled.
    _open: list[Tokens] = field(default_factory=list)
    _open_lengths: list[Int64s] = field(default_factory=list)
    _open_tokens: int = 0
    # The long document that is being taken: what is not yet in a chunk.
    _tail: list[Tokens] = field(default_factory=list)
    _tail_tokens: int = 0
    _mark: _Mark | None = None

    def add(self, tokens: Tokens, lengths: Int64s) -> None:
        """Take whole documents, joined in `tokens`; those without tokens are left out."""
        lengths = lengths[lengths > 0]
        self.documents += len(lengths)
        self._gathered.append(tokens)
        self._gathered_lengths.append(lengths)
        self._num_gathered += len(tokens)
        if self._num_gathered >= _BLOCK_TOKENS:
            self._write_block()

    def mark(self) -> None:
        """Remember this state for `roll_back`."""
        self._write_block()
        self._mark = _Mark(
            self.documents,
            len(self.parts),
            list(self._open),
            list(self._open_lengths),
            self._open_tokens,
        )

    def roll_back(self) -> None:
        """Forget what came after `mark`."""
        mark = self._mark
        assert mark is not None
        for part in self.parts[mark.parts :]:
            (self.folder / part.name).unlink()
        del self.parts[mark.parts :]
        self.documents = mark.documents
        self._open, self._open_lengths = mark.open, mark.open_lengths
        self._open_tokens = mark.open_tokens
        self._tail, self._tail_tokens = [], 0

    def add_piece(self, tokens: Tokens) -> None:
        """Take a piece of a long document."""
        limit = self.chunk_tokens
        self._tail.append(tokens)
        self._tail_tokens += len(tokens)
        if self._tail_tokens <= limit:
            return
        tail = np.concatenate(self._tail)
        self._close()
        while len(tail) > limit:
            self._write([tail[:limit]], np.array([limit], dtype=np.int64), continues=True)
            tail = tail[limit:]
        self._tail, self._tail_tokens = [tail.copy()], len(tail)

    def end_pieces(self) -> None:
        """The long document is complete."""
        if self._tail_tokens:
            tail = np.concatenate(self._tail)
            self._put(tail, np.array([len(tail)], dtype=np.int64))
            self.documents += 1
        self._tail, self._tail_tokens = [], 0

    def finish(self) -> None:
        """Write what is left."""
        self._write_block()
        self._close()

    def _write_block(self) -> None:
        if not self._num_gathered:
            return
        gathered, lengths = self._gathered, np.concatenate(self._gathered_lengths)
        # Where each document is: in which of the arrays, from where to where.
        counts = [len(each) for each in self._gathered_lengths]
        arrays = np.repeat(np.arange(len(gathered)), counts)
        ends = np.concatenate([np.cumsum(each) for each in self._gathered_lengths])
        self._gathered, self._gathered_lengths, self._num_gathered = [], [], 0
        shuffled = order.perm(order.key(self.seed, _DOCUMENTS, *self.key, self._blocks), len(ends))
        self._blocks += 1
        lengths, ends, arrays = lengths[shuffled], ends[shuffled], arrays[shuffled]
        starts = ends - lengths
        filled = np.cumsum(lengths)
        first, num = 0, len(lengths)
        while first < num:
            # As many documents as fit into the open chunk.
            room = self.chunk_tokens - self._open_tokens
            before = int(filled[first - 1]) if first else 0
            last = int(np.searchsorted(filled, before + room, side="right"))
            if last == first:
                if self._open_tokens:
                    self._close()
                    continue
                last = first + 1  # longer than a chunk
            these = slice(first, last)
            spans = zip(arrays[these].tolist(), starts[these].tolist(), ends[these].tolist())
            self._put(np.concatenate([gathered[n][a:b] for n, a, b in spans]), lengths[these])
            first = last

    def _put(self, tokens: Tokens, lengths: Int64s) -> None:
        """Into the open chunk: documents that fit, or one that may be too long for it."""
        limit = self.chunk_tokens
        if self._open_tokens + len(tokens) > limit:
            self._close()
        while len(tokens) > limit:
            self._write([tokens[:limit]], np.array([limit], dtype=np.int64), continues=True)
            tokens = tokens[limit:]
            lengths = np.array([len(tokens)], dtype=np.int64)
        self._open.append(tokens)
        self._open_lengths.append(lengths)
        self._open_tokens += len(tokens)

    def _close(self) -> None:
        if self._open:
            self._write(self._open, np.concatenate(self._open_lengths))
            self._open, self._open_lengths, self._open_tokens = [], [], 0

    def _write(self, tokens: list[Tokens], lengths: Int64s, *, continues: bool = False) -> None:
        path = self.folder / f"{self.name or 'all'}-{len(self.parts)}.bin"
        self.parts.append(write_chunk(path, tokens, lengths, self.dtype, continues=continues))


def framed(
    ids: Tokens, lengths: Int64s, bos_id: int | None, eos_id: int | None, dtype: str
) -> tuple[Tokens, Int64s]:
    """Each document with BOS and EOS around it, as `dtype`; one without tokens stays empty."""
    full = lengths > 0
    before, after = bos_id is not None, eos_id is not None
    lengths_framed = lengths + full * (before + after)
    ends = np.cumsum(lengths_framed)
    tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=dtype)
    firsts, lasts = (ends - lengths_framed)[full], ends[full] - 1
    if before:
        tokens[firsts] = bos_id
    if after:
        tokens[lasts] = eos_id
    if len(ids) >= _LONG_TOKENS * len(lengths):
        # One copy a document, which also changes the type.
        start = 0
        for first, length in zip(firsts.tolist(), lengths[full].tolist(), strict=True):
            inside = first + before
            tokens[inside : inside + length] = ids[start : start + length]
            start += length
        return tokens, lengths_framed
    free = np.ones(len(tokens), dtype=bool)
    if before:
        free[firsts] = False
    if after:
        free[lasts] = False
    tokens[free] = ids
    return tokens, lengths_framed

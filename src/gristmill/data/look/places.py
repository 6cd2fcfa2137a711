"""Where documents are among the chunks: their numbers, their tokens, and what lies at a place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.data.store.dataset import Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tokens = NDArray[Any]


@dataclass(frozen=True)
class Place:
    """A token of a document: which document, and how many of its tokens come before."""

    document: int
    before: int


class Places:
    """Documents of a dataset by number, from 0, in the order on the disk.

    One that is cut at the end of a chunk and goes on in the next counts once.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.continued = dataset.chunks.continues
        self._inherits = np.concatenate([[False], self.continued[:-1]])
        starting = dataset.chunks.documents - self._inherits
        self._first = np.cumsum(starting) - starting
        self.num_documents = int(starting.sum())

    def where(self, document: int) -> tuple[int, int]:
        """The chunk that a document begins in, and its item there."""
        chunk = int(np.searchsorted(self._first, document, side="right")) - 1
        return chunk, document - int(self._first[chunk]) + int(self._inherits[chunk])

    def length(self, document: int) -> int:
        """How many tokens a document has."""
        return sum(stop - start for _, start, stop in self._pieces(document))

    def tokens(self, document: int, most: int) -> Tokens:
        """The first tokens of a document, at most `most`."""
        parts, room = [], most
        for chunk, start, stop in self._pieces(document):
            part = self._dataset.map(chunk).tokens[start : min(stop, start + room)]
            parts.append(part)
            room -= len(part)
            if not room:
                break
        return np.concatenate(parts)

    def at(self, chunk: int, token: int) -> Place:
        """The document that a token of a chunk belongs to."""
        mapped = self._dataset.map(chunk)
        width = mapped.tokens.itemsize
        byte = int(mapped.offsets[0]) + token * width
        item = int(np.searchsorted(mapped.offsets, byte, side="right")) - 1
        before = (byte - int(mapped.offsets[item])) // width
        document = int(self._first[chunk]) + item - int(self._inherits[chunk])
        while item == 0 and self._inherits[chunk]:
            chunk -= 1
            offsets = self._dataset.map(chunk).offsets
            before += int(offsets[-1] - offsets[-2]) // width
            item = len(offsets) - 2
        return Place(document, before)

    def ends_at(self, chunk: int, token: int) -> bool:
        """Whether a token of a chunk is the last of its document."""
        return bool(len(self._dataset.map(chunk).ends_within(token, token + 1)))

    def _pieces(self, document: int) -> list[tuple[int, int, int]]:
        """The chunk and the range of tokens of each piece of a document."""
        chunk, item = self.where(document)
        pieces = []
        while True:
            mapped = self._dataset.map(chunk)
            offsets, width = mapped.offsets, mapped.tokens.itemsize
            bounds = offsets[item : item + 2].astype(np.int64) - int(offsets[0])
            pieces.append((chunk, int(bounds[0]) // width, int(bounds[1]) // width))
            if not (self.continued[chunk] and item == len(offsets) - 2):
                return pieces
            chunk, item = chunk + 1, 0

"""How long the documents of a dataset are, from its chunk headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gristmill.data.store.dataset import Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

# Beyond this many documents an even sample of the chunks is looked at.
MOST_DOCUMENTS = 8_000_000
_MOST_CHUNKS = 20_000
# Chunks of an object store have to come here first.
_MOST_FETCHED = 8


@dataclass(frozen=True)
class Bin:
    """Documents of `low` to `high` tokens."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens, with BOS and EOS. `bins` are powers of two wide."""

    documents: int
    """How many were looked at; all of them unless `chunks` is less than there are."""
    chunks: int
    shortest: int
    median: int
    mean: float
    p90: int
    p99: int
    longest: int
    bins: tuple[Bin, ...]


def document_lengths(dataset: Dataset) -> Lengths:
    """The lengths of all documents, or of those in an even sample of the chunks."""
    chunks = _sample(dataset)
    continued = dataset.chunks.continues
    parts = [_starting_in(dataset, continued, int(chunk)) for chunk in chunks]
    lengths = np.sort(np.concatenate(parts))
    if not len(lengths):  # every chunk looked at lies inside one document
        lengths = np.array([dataset.num_tokens], dtype=np.int64)
    at = [len(lengths) * share // 100 for share in (50, 90, 99)]
    median, p90, p99 = (int(lengths[min(place, len(lengths) - 1)]) for place in at)
    return Lengths(
        documents=len(lengths),
        chunks=len(chunks),
        shortest=int(lengths[0]),
        median=median,
        mean=float(lengths.mean()),
        p90=p90,
        p99=p99,
        longest=int(lengths[-1]),
        bins=tuple(_bins(lengths)),
    )


def _sample(dataset: Dataset) -> Int64s:
    """Numbers of the chunks to look at, spread evenly over all."""
    count = len(dataset.chunks)
    documents = max(1, int(dataset.chunks.documents.sum()))
    most = _MOST_CHUNKS if dataset.cache is None else _MOST_FETCHED
    wanted = max(1, min(count, most, count * MOST_DOCUMENTS // documents))
    return (np.arange(wanted, dtype=np.int64) * count) // wanted


def _starting_in(dataset: Dataset, continued: NDArray[np.bool_], chunk: int) -> Int64s:
    """Lengths of the documents that begin in a chunk, the last one followed to its end."""
    lengths = np.diff(dataset.map(chunk).ends, prepend=0)
    if chunk and continued[chunk - 1]:
        lengths = lengths[1:]
    if continued[chunk] and len(lengths):
        following = chunk + 1
        while True:
            ends = dataset.map(following).ends[:2]
            lengths[-1] += ends[0]
            if len(ends) > 1 or not continued[following]:
                break
            following += 1
    return lengths


def _bins(lengths: Int64s) -> list[Bin]:
    """Counts of sorted lengths by powers of two, without empty ends."""
    first = int(lengths[0]).bit_length()
    last = int(lengths[-1]).bit_length()
    edges = np.array([0, *(2**power for power in range(64)), 2**63 - 1], dtype=np.uint64)
    found = []
    sums = np.concatenate([[0], np.cumsum(lengths)])
    for bits in range(first, last + 1):
        low, stop = int(edges[bits]), int(edges[bits + 1])
        a, b = np.searchsorted(lengths, [low, stop], side="left").tolist()
        found.append(Bin(low, stop - 1, b - a, int(sums[b] - sums[a])))
    return found

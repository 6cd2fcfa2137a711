"""Samples of a dataset in one global order, as NumPy arrays, by position alone.

The state of a stream is the number of samples consumed. A global batch is a pure function of the
dataset, the settings and that number: ranks only choose which of its rows they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gristmill.data.dataset import Dataset
from gristmill.data.order import Order, samples_per_chunk
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

VERSION = 1


@dataclass(frozen=True)
class Batch:
    """The rows of one rank."""

    tokens: Int64s
    """Token ids, int64 [rows, seq_len + 1], memory of its own; zeros where not valid."""
    valid: NDArray[np.bool_]
    """bool [rows]; False for a row that only fills the shape."""
    doc_ends: list[NDArray[np.int32]]
    """For each row, where documents end: the index after a last token, 1 to seq_len + 1."""
    sample_ids: Int64s
    """Number of each sample in the dataset as it lies on the disk; -1 where not valid."""


class TokenStream:
    """Samples of `seq_len + 1` tokens, `seq_len` apart, epoch after epoch in a hashed order.

    With `endless=False` there is one pass, and rows beyond its end are not valid. `shuffle=False`
    keeps the order on the disk. Raises UserError when an endless stream would have no sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int,
        *,
        seed: int,
        shuffle: bool = True,
        endless: bool = True,
    ) -> None:
        assert seq_len > 0
        self.dataset, self.seq_len = dataset, seq_len
        self._seed, self._shuffle, self._endless = seed, shuffle, endless
        samples = samples_per_chunk(dataset.chunk_tokens, seq_len)
        self._first_sample = np.cumsum(samples) - samples
        self._order = Order(samples, seed, shuffle=shuffle)
        if endless and self.num_samples == 0:
            longest = int(dataset.chunk_tokens.max())
            raise UserError(
                f"{dataset.path} has no sample of {seq_len} tokens: it holds "
                f"{dataset.num_tokens:,} tokens in {len(dataset.chunks):,} chunks, the longest of "
                f"{longest:,}, and a sample takes {seq_len + 1:,}. use a shorter sequence "
                "or more text.",
                fix={"--train.max_seq_length": max(1, longest - 1)},
            )

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self._order.num_samples

    def fingerprint(self) -> dict[str, str | int]:
        """What the order depends on: equal fingerprints, equal streams."""
        return {
            "version": VERSION,
            "dataset_id": self.dataset.dataset_id,
            "seq_len": self.seq_len,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
        }

    def batch(self, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's rows of the global batch that follows `samples` consumed ones.

        All ranks get as many rows, the batch divided by `world` and rounded up; the valid rows of
        the ranks, one after another, are the batch. Neighbours in it come from neighbouring chunks.
        """
        assert samples >= 0
        assert batch_size > 0
        assert 0 <= rank < world
        positions = samples + np.arange(batch_size, dtype=np.int64)
        if not self._endless:
            positions = positions[positions < self.num_samples]
        chunk, row = self._located(positions)
        mine = slice(rank * len(chunk) // world, (rank + 1) * len(chunk) // world)
        return self._read(chunk[mine], row[mine], -(-batch_size // world))

    def _located(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Chunk and row of each sample, those from one chunk next to each other."""
        if len(positions) == 0:
            return positions, positions
        chunk, row, place = self._order.locate(positions)
        nearby = np.argsort(place, kind="stable")
        return chunk[nearby], row[nearby]

    def _read(self, chunks: Int64s, rows: Int64s, num_rows: int) -> Batch:
        width = self.seq_len + 1
        tokens = np.zeros((num_rows, width), dtype=np.int64)
        doc_ends: list[NDArray[np.int32]] = []
        for index, (chunk, row) in enumerate(zip(chunks.tolist(), rows.tolist(), strict=True)):
            start = row * self.seq_len
            mapped = self.dataset.map(chunk)
            tokens[index] = mapped.tokens[start : start + width]
            doc_ends.append(mapped.ends_within(start, start + width))
        count = len(chunks)
        sample_ids = np.full(num_rows, -1, dtype=np.int64)
        sample_ids[:count] = self._first_sample[chunks] + rows
        doc_ends += [np.empty(0, dtype=np.int32)] * (num_rows - count)
        return Batch(tokens, np.arange(num_rows) < count, doc_ends, sample_ids)

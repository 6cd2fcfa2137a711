"""Samples of datasets in one global order, as NumPy arrays, by position alone.

    sample number ──mixture──▶ source, its k-th ──order──▶ chunk, row ──slice──▶ this rank's rows

The state of a stream is the number of samples consumed. A global batch is a pure function of the
datasets, the settings and that number: ranks only choose which of its rows they read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.data.reading.chunk_cache import ChunkCache, Wanted
from gristmill.data.reading.look_ahead import BatchShare, LookAhead
from gristmill.data.reading.mixture import Mixture
from gristmill.data.reading.order import SPREAD, Order, key, perm, samples_per_chunk
from gristmill.data.reading.pack import VERSION as PACKING_VERSION
from gristmill.data.reading.pack import PackSummary, find_plan
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

VERSION = 1

# Samples that are located at once, and how many such blocks are kept.
_BLOCK, _MAX_BLOCKS = 4096, 8


@dataclass(frozen=True)
class Batch:
    """The rows of one rank."""

    tokens: Int64s
    """Token ids, int64 [rows, seq_len + 1], memory of its own; zeros where not valid."""
    valid: NDArray[np.bool_]
    """bool [rows]; False for a row that only fills the shape."""
    doc_ends: list[NDArray[np.int32]]
    """For each row, where documents end: the index after a last token, 1 to seq_len + 1. In a
    packed row, where each piece of a document ends."""
    sample_ids: Int64s
    """Number of each sample in its dataset as it lies on the disk, those of earlier sources before
    it; -1 where not valid."""
    sources: Int64s
    """Which source each sample is from; -1 where not valid."""
    lengths: Int64s
    """Tokens that are there, int64 [rows]: seq_len + 1, or fewer in a packed row; 0 where not
    valid."""
    targets: NDArray[np.bool_] | None = None
    """Which tokens are learned to be written, bool [rows, seq_len + 1]; None: all."""


@dataclass(frozen=True)
class _Rows:
    """Where samples are: source, chunk and row in it, int64 arrays of equal length."""

    source: Int64s
    chunk: Int64s
    row: Int64s

    def __getitem__(self, which: slice | Int64s) -> _Rows:
        return _Rows(self.source[which], self.chunk[which], self.row[which])


class TokenStream:
    """Samples of `seq_len + 1` tokens, `seq_len` apart, epoch after epoch in a hashed order.

    `datasets` is one, or the sources of a `mixture`, which gives each sample its source; without a
    mixture they follow one another. With `endless=False` there is one pass, and rows beyond its end
    are not valid. `shuffle=False` keeps the order on the disk. Ranks read neighbouring chunks of a
    batch, or with `spread` a random share of it. With `packing`, samples are rows of whole
    documents, filled up with padding (`pack.py`), and belong with a document mask. Raises
    UserError when an endless stream would have no sample.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        seq_len: int,
        *,
        seed: int,
        mixture: Mixture | None = None,
        shuffle: bool = True,
        endless: bool = True,
        spread: bool = False,
        packing: bool = False,
    ) -> None:
        assert seq_len > 0
        self.datasets = (datasets,) if isinstance(datasets, Dataset) else tuple(datasets)
        assert len(self.datasets) == 1 or mixture is not None or not endless
        self.seq_len, self.mixture = seq_len, mixture
        self._seed, self._shuffle, self._endless, self._spread = seed, shuffle, endless, spread
        self._plans = [find_plan(dataset, seq_len) for dataset in self.datasets if packing]
        self._orders: list[Order] = []
        self._blocks: OrderedDict[int, Int64s] = OrderedDict()
        self._first_samples: list[Int64s] = []
        before = 0
        for number, dataset in enumerate(self.datasets):
            if packing:
                samples = self._plans[number].chunk_rows
            else:
                samples = samples_per_chunk(dataset.chunk_tokens, seq_len)
            self._first_samples.append(np.cumsum(samples) - samples + before)
            self._orders.append(Order(samples, seed, shuffle=shuffle, source=number))
            before += self._orders[-1].num_samples
            if endless and self._orders[-1].num_samples == 0:
                raise _no_target(dataset) if packing else _no_sample(dataset, seq_len)
        self._starts = np.cumsum([0, *(order.num_samples for order in self._orders)])
        caches = {id(d.cache): d.cache for d in self.datasets if d.cache is not None}
        self._look_ahead = [
            LookAhead(cache, partial(self._chunks_of, cache), self.num_samples)
            for cache in caches.values()
        ]

    @property
    def num_samples(self) -> int:
        """Samples of all datasets, each counted once."""
        return int(self._starts[-1])

    def source_samples(self) -> Int64s:
        """Samples of each dataset, int64[sources]."""
        return np.diff(self._starts)

    @property
    def packing(self) -> list[PackSummary]:
        """What packing makes of each dataset; empty for a stream that is not packed."""
        return [plan.summary for plan in self._plans]

    def epochs(self, samples: int) -> list[float]:
        """How often each source has been gone through after `samples` samples of the stream."""
        if self.mixture is None:
            return [samples / self.num_samples] * len(self.datasets)
        taken = self.mixture.counts(samples)
        return [int(n) / int(all_) for n, all_ in zip(taken, self.source_samples(), strict=True)]

    def num_tokens(self, samples: int, count: int) -> int:
        """Tokens that are trained on in `count` samples, whichever they are."""
        return count * self.seq_len

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on: equal fingerprints, equal streams."""
        ids = [dataset.dataset_id for dataset in self.datasets]
        found: dict[str, Any] = {
            "version": VERSION,
            "dataset_id": ids[0] if len(ids) == 1 else ids,
            "seq_len": self.seq_len,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
        }
        if self.mixture is not None:
            found["mixture"] = [[s.start, list(s.weights)] for s in self.mixture.stages]
        if self._spread:
            found["spread"] = 1
        if self._plans:
            found["packing"] = PACKING_VERSION
        return found

    def batch(self, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's rows of the global batch that follows `samples` consumed ones.

        All ranks get as many rows, the batch divided by `world` and rounded up; the valid rows of
        the ranks, one after another, are the batch. Neighbours in it come from neighbouring chunks,
        unless they are spread.
        """
        assert samples >= 0
        assert batch_size > 0
        assert 0 <= rank < world
        for ahead in self._look_ahead:
            ahead.at(samples, BatchShare(batch_size, rank, world))
        mine = self._rows(samples, batch_size, rank, world)
        return self._read(mine, -(-batch_size // world))

    def place(self, sample: int) -> tuple[int, int, Int64s]:
        """Where a sample lies, by its number as in `Batch.sample_ids`: its source, the chunk of
        that, and the place of each of its tokens in the chunk, int64[tokens]."""
        source = int(np.searchsorted(self._starts, sample, side="right")) - 1
        chunk = int(np.searchsorted(self._first_samples[source], sample, side="right")) - 1
        row = sample - int(self._first_samples[source][chunk])
        if self._plans:
            mapped = self.datasets[source].map(chunk)
            return source, chunk, self._plans[source].places(mapped, chunk, row)[0]
        start = row * self.seq_len
        return source, chunk, np.arange(start, start + self.seq_len + 1)

    def _rows(self, samples: int, batch_size: int, rank: int, world: int) -> _Rows:
        """A rank's part of a batch."""
        stop = samples + batch_size
        if not self._endless:
            stop = max(samples, min(stop, self.num_samples))
        parts = [
            self._block(block)[:, max(samples - block * _BLOCK, 0) : stop - block * _BLOCK]
            for block in range(samples // _BLOCK, -(-stop // _BLOCK))
        ]
        located = parts[0] if len(parts) == 1 else _joined(parts)
        source, chunk, row, place = located
        rows, count = _Rows(source, chunk, row), stop - samples
        if self._spread and count:
            rows = rows[perm(key(self._seed, SPREAD, samples), count)]
        else:
            rows = rows[np.lexsort((place, source))]
        return rows[slice(rank * count // world, (rank + 1) * count // world)]

    def _block(self, block: int) -> Int64s:
        """Source, chunk, row and place of many samples in a row, int64 [4, samples], kept a while.

        A batch costs little more than its samples then, however small it is.
        """
        if block not in self._blocks:
            stop = (block + 1) * _BLOCK
            if not self._endless:
                stop = min(stop, self.num_samples)
            self._blocks[block] = self._located(np.arange(block * _BLOCK, stop, dtype=np.int64))
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _located(self, positions: Int64s) -> Int64s:
        """Source, chunk, row and place in the reading order of samples, int64 [4, samples]."""
        if self.mixture is not None:
            source, number = self.mixture.locate(positions)
        else:
            source = np.zeros_like(positions)
            if len(self.datasets) > 1:
                source = np.searchsorted(self._starts, positions, side="right") - 1
            number = positions - self._starts[source]
        found = np.empty((4, len(positions)), dtype=np.int64)
        found[0] = source
        for index in np.unique(source).tolist():
            here = source == index
            found[1:, here] = self._orders[index].locate(number[here])
        return found

    def _chunks_of(self, cache: ChunkCache, samples: int, share: BatchShare) -> Iterator[Wanted]:
        """The chunks that a rank needs of a batch, in the order in which it reads them."""
        rows = self._rows(samples, share.batch_size, share.rank, share.world)
        both = zip(rows.source.tolist(), rows.chunk.tolist(), strict=True)
        for source, chunk in dict.fromkeys(both):
            if self.datasets[source].cache is cache:
                yield self.datasets[source].wanted(chunk)

    def _read(self, rows: _Rows, num_rows: int) -> Batch:
        width, count = self.seq_len + 1, len(rows.source)
        tokens = np.zeros((num_rows, width), dtype=np.int64)
        sample_ids, sources = np.full((2, num_rows), -1, dtype=np.int64)
        lengths = np.zeros(num_rows, dtype=np.int64)
        lengths[:count] = width
        doc_ends: list[NDArray[np.int32]] = []
        places = zip(rows.source.tolist(), rows.chunk.tolist(), rows.row.tolist(), strict=True)
        for index, (source, chunk, row) in enumerate(places):
            mapped = self.datasets[source].map(chunk)
            if self._plans:
                where, ends = self._plans[source].places(mapped, chunk, row)
                tokens[index, : len(where)] = mapped.tokens[where]
                lengths[index] = len(where)
            else:
                start = row * self.seq_len
                tokens[index] = mapped.tokens[start : start + width]
                ends = mapped.ends_within(start, start + width)
            doc_ends.append(ends)
            sample_ids[index] = self._first_samples[source][chunk] + row
        sources[:count] = rows.source
        doc_ends += [np.empty(0, dtype=np.int32)] * (num_rows - count)
        valid = np.arange(num_rows) < count
        return Batch(tokens, valid, doc_ends, sample_ids, sources, lengths)


def _joined(parts: list[Int64s]) -> Int64s:
    """Neighbouring blocks of located samples as one; none is a block without samples."""
    return np.concatenate([np.empty((4, 0), dtype=np.int64), *parts], axis=1)


def _no_sample(dataset: Dataset, seq_len: int) -> UserError:
    longest = int(dataset.chunk_tokens.max())
    return UserError(
        f"{dataset.path} has no sample of {seq_len} tokens: it holds "
        f"{dataset.num_tokens:,} tokens in {len(dataset.chunks):,} chunks, the longest of "
        f"{longest:,}, and a sample takes {seq_len + 1:,}. use a shorter sequence or more text.",
        fix={"--train.max_seq_length": max(1, longest - 1)},
    )


def _no_target(dataset: Dataset) -> UserError:
    return UserError(
        f"{dataset.path} has nothing to pack: each of its {dataset.num_documents:,} documents is a "
        "single token. if its items are not documents, leave packing out.",
        fix={"--train.packing": "concat"},
    )

"""Records as samples of a training: their order, and the rows that the records of a batch share.

    sample number ──epoch──▶ record ──pack──▶ rows of whole records, kept apart by masks

A global batch is the records that follow `samples` consumed ones, whatever packs them into rows:
packing, ranks and micro-batches change nothing of what is learned in a step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.data.reading.order import key, perm
from gristmill.data.reading.pack import PackSummary
from gristmill.data.reading.stream import Batch
from gristmill.finetune.examples import Examples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

VERSION = 1
RECORDS = 5
"""What the key of a permutation is for; part of the order."""


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of records in rows of at most `width` tokens, few rows (best-fit decreasing).

    Records of one row are in their own order, and so are rows by their first record.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are free, row), sorted
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[number]
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(number)
        else:
            free, row = width, len(rows)
            rows.append([number])
        insort(room, (free - length, row))
    return sorted(sorted(row) for row in rows)


class _Rows:
    """What records to train on and held-out ones have in common: one source, read as rows."""

    num_samples: int
    """Of one pass."""

    def __init__(self, examples: Examples, seq_len: int) -> None:
        self.examples, self.seq_len = examples, seq_len
        self._lengths = examples.lengths
        assert len(examples) == 0 or int(self._lengths.max()) <= seq_len + 1

    @property
    def packing(self) -> list[PackSummary]:
        """Nothing: packing changes no sample."""
        return []

    def source_samples(self) -> Int64s:
        """All samples: there is one source."""
        return np.array([self.num_samples], dtype=np.int64)

    def epochs(self, samples: int) -> list[float]:
        """How often the samples have been gone through."""
        return [samples / max(1, self.num_samples)]

    def _packed(self, records: Sequence[int], *, packing: bool) -> list[list[int]]:
        """The records in rows."""
        if not packing:
            return [[record] for record in records]
        lengths = [int(self._lengths[record]) for record in records]
        rows = pack(lengths, self.seq_len + 1)
        return [[records[number] for number in row] for row in rows]

    def _read(self, rows: Sequence[Sequence[int]], num_rows: int) -> Batch:
        """`rows` and as many empty ones as make them `num_rows`."""
        width = self.seq_len + 1
        tokens = np.zeros((num_rows, width), dtype=np.int64)
        targets = np.zeros((num_rows, width), dtype=np.bool_)
        ids, sources = np.full((2, num_rows), -1, dtype=np.int64)
        lengths = np.zeros(num_rows, dtype=np.int64)
        doc_ends: list[NDArray[np.int32]] = []
        for place, records in enumerate(rows):
            ends, at = [], 0
            for record in records:
                start, stop = self.examples.starts[record : record + 2].tolist()
                after = at + stop - start
                tokens[place, at:after] = self.examples.tokens[start:stop]
                targets[place, at:after] = self.examples.learned[start:stop]
                at = after
                ends.append(at)
            doc_ends.append(np.array(ends, dtype=np.int32))
            lengths[place], ids[place], sources[place] = at, records[0], 0
        doc_ends += [np.empty(0, dtype=np.int32)] * (num_rows - len(rows))
        valid = np.arange(num_rows) < len(rows)
        return Batch(tokens, valid, doc_ends, ids, sources, lengths, targets)


class RecordSamples(_Rows):
    """Records to train on, epoch after epoch in a hashed order; a sample is a record.

    Records are at most `seq_len + 1` tokens long. See `train.job.Samples`.
    """

    def __init__(self, examples: Examples, seq_len: int, *, seed: int, packing: bool) -> None:
        assert len(examples)
        super().__init__(examples, seq_len)
        self.num_samples = len(examples)
        self._seed, self._packing = seed, packing
        self._epochs: OrderedDict[int, tuple[Int64s, Int64s]] = OrderedDict()
        self._total = int(examples.lengths.sum())

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on."""
        return {
            "version": VERSION,
            "dataset_id": self.examples.digest,
            "seq_len": self.seq_len,
            "seed": self._seed,
            "records": self.num_samples,
        }

    def num_tokens(self, samples: int, count: int) -> int:
        """Tokens of `count` records after the first `samples`."""
        return self._tokens_before(samples + count) - self._tokens_before(samples)

    def batch(self, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's rows of the batch of `batch_size` records after `samples` ones.

        All ranks get as many rows, some of them empty.
        """
        records = self._located(samples, batch_size).tolist()
        rows = self._packed(records, packing=self._packing)
        return self._read(rows[rank::world], -(-len(rows) // world))

    def usual_rows(self, batch_size: int, *, batches: int = 64) -> int:
        """Rows that a batch of so many records needs as a rule: nine of ten need no more."""
        if not self._packing:
            return batch_size
        counts = [
            len(self._packed(self._located(n * batch_size, batch_size).tolist(), packing=True))
            for n in range(batches)
        ]
        return int(np.quantile(counts, 0.9, method="nearest"))

    def _located(self, samples: int, count: int) -> Int64s:
        """The records at `count` places of the endless order."""
        places = np.arange(samples, samples + count, dtype=np.int64)
        epochs, numbers = np.divmod(places, self.num_samples)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = self._epoch(epoch)[0][numbers[here]]
        return found

    def _tokens_before(self, samples: int) -> int:
        """Tokens of the first `samples` records of the endless order."""
        epoch, number = divmod(samples, self.num_samples)
        return epoch * self._total + int(self._epoch(epoch)[1][number])

    def _epoch(self, epoch: int) -> tuple[Int64s, Int64s]:
        """The records in the order of an epoch, and the tokens before each and before its end."""
        if epoch not in self._epochs:
            order = perm(key(self._seed, RECORDS, epoch), self.num_samples)
            before = np.concatenate([[0], np.cumsum(self.examples.lengths[order])])
            self._epochs[epoch] = order, before.astype(np.int64)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class HeldOutRows(_Rows):
    """Held-out records, packed once; a sample is a row. See `train.job.Samples`."""

    def __init__(self, examples: Examples, seq_len: int) -> None:
        super().__init__(examples, seq_len)
        self._held_out = self._packed(range(len(examples)), packing=True)
        self.num_samples = len(self._held_out)

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"version": VERSION, "dataset_id": self.examples.digest, "seq_len": self.seq_len}

    def num_tokens(self, samples: int, count: int) -> int:
        """Tokens of `count` rows after the first `samples`."""
        rows = self._held_out[samples : samples + count]
        return int(sum(self._lengths[record] for row in rows for record in row))

    def batch(self, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of `batch_size` rows after the first `samples`."""
        rows = self._held_out[samples : samples + batch_size]
        return self._read(rows[rank::world], -(-batch_size // world))

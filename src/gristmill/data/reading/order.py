"""The order of samples as pure functions of integers: no state, no index, no random generator.

    position ──epoch──▶ chunk order ──window──▶ permutation ──▶ (chunk, row)

Chunks are put into a hashed order, and inside windows of neighbouring chunks all samples are
permuted, so that reading stays local while a batch mixes a whole window. Only fixed 64-bit integer
arithmetic is used: the order is the same on every machine and with every version of NumPy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

WINDOW_CHUNKS = 64
"""Chunks whose samples are mixed with each other."""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
# What a key is for; part of the order, so never renumbered.
_CHUNKS, _SAMPLES = 1, 2
SPREAD = 4  # 3 is the shuffle of documents in preparation

_Value = TypeVar("_Value")


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`values` through the finaliser of splitmix64 (Steele, Lea and Flood, 2014), a bijection."""
    z = values.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key for a sequence of integers; order and number of the parts matter."""
    state = len(parts)
    for part in parts:
        mixed = mix64(np.array([(state + _GOLDEN) & _MASK], dtype=np.uint64))
        state = int(mixed[0]) ^ (part & _MASK)
    return int(mix64(np.array([state], dtype=np.uint64))[0])


def perm(permutation_key: int, length: int) -> Int64s:
    """The numbers 0 … length - 1 in the order that the key gives, int64[length]."""
    counters = np.arange(length, dtype=np.uint64) * np.uint64(_GOLDEN)
    hashes = mix64(counters + np.uint64(permutation_key & _MASK))
    return np.argsort(hashes, kind="stable").astype(np.int64, copy=False)


def samples_per_chunk(chunk_tokens: Int64s, seq_len: int) -> Int64s:
    """How many samples of `seq_len + 1` tokens, `seq_len` apart, each chunk holds."""
    return np.maximum(0, (chunk_tokens - 1) // seq_len)


@dataclass(frozen=True)
class Epoch:
    """One pass: `chunks` in reading order; those before place i hold `starts[i]` samples."""

    number: int
    chunks: Int64s
    starts: Int64s
    window_starts: Int64s
    """Samples before each window, and their number as the last entry."""


class Order:
    """The order of one dataset's samples: `locate` is a pure function, its results are kept.

    `num_samples` counts one epoch. `source` tells the sources of a mixture apart.
    """

    def __init__(
        self, chunk_samples: Int64s, seed: int, *, shuffle: bool = True, source: int = 0
    ) -> None:
        self.num_samples = int(chunk_samples.sum())
        self._chunk_samples = chunk_samples
        self._seed, self._shuffle, self._source = seed, shuffle, source
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Int64s] = OrderedDict()

    def locate(self, positions: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Where the samples at `positions` of the endless stream are.

        Returns int64 arrays as long as `positions`: the chunk, the row in it, and the place of the
        chunk in the reading order, epochs one after another (what locality sorts by).
        """
        chunk, row, place = (np.empty(len(positions), dtype=np.int64) for _ in range(3))
        numbers = positions // self.num_samples
        for number in np.unique(numbers):
            here = numbers == number
            epoch = self.epoch(int(number))
            inside = self._permuted(epoch, positions[here] - number * self.num_samples)
            at = np.searchsorted(epoch.starts, inside, side="right") - 1
            chunk[here] = epoch.chunks[at]
            row[here] = inside - epoch.starts[at]
            place[here] = at + number * len(epoch.chunks)
        return chunk, row, place

    def epoch(self, number: int) -> Epoch:
        """The chunk order of one pass."""
        return _kept(self._epochs, number, 2, lambda: self._make_epoch(number))

    def _make_epoch(self, number: int) -> Epoch:
        count = len(self._chunk_samples)
        chunks = np.arange(count, dtype=np.int64)
        if self._shuffle:
            chunks = perm(key(self._seed, _CHUNKS, self._source, number), count)
        starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(self._chunk_samples[chunks], out=starts[1:])
        return Epoch(number, chunks, starts, np.append(starts[:-1:WINDOW_CHUNKS], starts[-1]))

    def _permuted(self, epoch: Epoch, positions: Int64s) -> Int64s:
        """Positions of an epoch after the permutation inside each window."""
        if not self._shuffle:
            return positions
        inside = np.empty_like(positions)
        windows = np.searchsorted(epoch.window_starts, positions, side="right") - 1
        for window in np.unique(windows):
            here = windows == window
            base = epoch.window_starts[window]
            inside[here] = base + self._window(epoch, int(window))[positions[here] - base]
        return inside

    def _window(self, epoch: Epoch, window: int) -> Int64s:
        length = int(epoch.window_starts[window + 1] - epoch.window_starts[window])
        part = (self._seed, _SAMPLES, self._source, epoch.number, window)
        return _kept(self._windows, (epoch.number, window), 3, lambda: perm(key(*part), length))


_Key = TypeVar("_Key")


def _kept(
    store: OrderedDict[_Key, _Value], name: _Key, limit: int, make: Callable[[], _Value]
) -> _Value:
    """The value called `name`, made when it is not there; the oldest beyond `limit` goes."""
    if name not in store:
        store[name] = make()
        while len(store) > limit:
            store.popitem(last=False)
    store.move_to_end(name)
    return store[name]

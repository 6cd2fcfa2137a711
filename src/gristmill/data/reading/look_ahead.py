"""Which chunks the coming batches need, and when: what makes fetching ahead exact.

The batches to come are known, so their chunks are: one batch after another is located in advance,
and behind these whole blocks of samples, until the chunks they need would fill the cache, and the
cache is told. A step forward locates only what has come into view.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gristmill.data.reading.chunk_cache import ChunkCache, Wanted

# Batches that are looked at one by one. A window of chunks may hold a million samples: behind the
# batches, blocks of samples reach the next window long before the first batch that needs it.
_MAX_BATCHES = 64
_BLOCK_SAMPLES = 1 << 14
_MAX_BLOCKS = 256


@dataclass(frozen=True)
class BatchShare:
    """What makes batches comparable: their size, and whose rows of them these are."""

    batch_size: int
    rank: int
    world: int


_First = OrderedDict[str, tuple[int, Wanted]]


class LookAhead:
    """Tells a cache what one reader will need. `chunks_of(samples, share)` gives a batch's; nothing
    further than `horizon` samples away is looked at."""

    def __init__(
        self,
        cache: ChunkCache,
        chunks_of: Callable[[int, BatchShare], Iterable[Wanted]],
        horizon: int,
    ) -> None:
        self._cache, self._chunks_of, self._horizon = cache, chunks_of, horizon
        self._share: BatchShare | None = None
        self._batches: deque[tuple[int, list[Wanted]]] = deque()
        self._blocks: deque[tuple[int, list[Wanted]]] = deque()
        self._behind: _First = OrderedDict()

    def at(self, samples: int, share: BatchShare) -> None:
        """The batch after `samples` is about to be read: fetch for it and for those behind it."""
        if share != self._share or not self._batches or self._batches[0][0] > samples:
            self._share, self._batches, self._blocks = share, deque(), deque()
            self._behind.clear()
        while self._batches and self._batches[0][0] < samples:
            self._batches.popleft()
        if self._batches and (self._batches[0][0] - samples) % share.batch_size:
            self._batches.clear()
        coming = self._in_view(samples, share)
        uses = {key: position - samples for key, (position, _) in coming.items()}
        self._cache.ahead([wanted for _, wanted in coming.values()], uses)

    def _in_view(self, samples: int, share: BatchShare) -> _First:
        """For each chunk needed soon, by its key, when it is needed first; soonest first."""
        first: _First = OrderedDict()
        size, position, number = 0, samples, 0
        while number < _MAX_BATCHES and size < self._cache.ahead_bytes:
            if number == len(self._batches):
                self._batches.append((position, list(self._chunks_of(position, share))))
            for wanted in self._batches[number][1]:
                if wanted.key not in first:
                    first[wanted.key] = position, wanted
                    size += wanted.record.bytes
            position, number = position + share.batch_size, number + 1
        if size < self._cache.ahead_bytes:
            self._look_behind(position, share)
            for key, (start, wanted) in self._behind.items():
                if size >= self._cache.ahead_bytes:
                    break
                if key not in first:
                    first[key] = max(start, position), wanted
                    size += wanted.record.bytes
        return first

    def _look_behind(self, samples: int, share: BatchShare) -> None:
        """Let blocks begin with that of `samples`, and reach one further than they did."""
        length = max(share.batch_size, min(_BLOCK_SAMPLES, self._horizon // _MAX_BATCHES))
        start = samples // length * length
        if self._blocks and self._blocks[0][0] != start:
            while self._blocks and self._blocks[0][0] < start:
                self._blocks.popleft()
            self._behind.clear()
            for position, found in self._blocks:
                self._add(position, found)
        start += len(self._blocks) * length
        size = sum(wanted.record.bytes for _, wanted in self._behind.values())
        # Twice, since what the batches need is in it too.
        if (
            len(self._blocks) < _MAX_BLOCKS
            and size < 2 * self._cache.ahead_bytes
            and start < samples + self._horizon
        ):
            found = list(self._chunks_of(start, BatchShare(length, share.rank, share.world)))
            self._blocks.append((start, found))
            self._add(start, found)

    def _add(self, position: int, found: Iterable[Wanted]) -> None:
        for wanted in found:
            self._behind.setdefault(wanted.key, (position, wanted))

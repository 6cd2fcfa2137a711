"""Which chunks the coming batches need, and when: what makes fetching ahead exact.

The batches to come are known, so their chunks are: one batch after another is located in advance,
until the chunks they need would fill the cache, and the cache is told. A step forward locates only
what has come into view.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gristmill.data.chunk_cache import ChunkCache, Wanted

_MAX_BATCHES = 256


@dataclass(frozen=True)
class Plan:
    """What makes batches comparable: their size, and whose rows of them these are."""

    batch_size: int
    rank: int
    world: int


class LookAhead:
    """Tells a cache what one reader will need. `chunks_of(samples, plan)` gives a batch's."""

    def __init__(
        self, cache: ChunkCache, chunks_of: Callable[[int, Plan], Iterable[Wanted]]
    ) -> None:
        self._cache, self._chunks_of = cache, chunks_of
        self._plan: Plan | None = None
        self._batches: deque[tuple[int, list[Wanted]]] = deque()

    def at(self, samples: int, plan: Plan) -> None:
        """The batch after `samples` is about to be read: fetch for it and for those behind it."""
        if plan != self._plan or not self._batches or self._batches[0][0] > samples:
            self._plan, self._batches = plan, deque()
        while self._batches and self._batches[0][0] < samples:
            self._batches.popleft()
        if self._batches and (self._batches[0][0] - samples) % plan.batch_size:
            self._batches.clear()
        coming = self._in_view(samples, plan)
        uses = {key: position - samples for key, (position, _) in coming.items()}
        self._cache.ahead([wanted for _, wanted in coming.values()], uses)

    def _in_view(self, samples: int, plan: Plan) -> OrderedDict[str, tuple[int, Wanted]]:
        """For each chunk needed soon, by its key, the batch that needs it first; soonest first."""
        first: OrderedDict[str, tuple[int, Wanted]] = OrderedDict()
        size, position, number = 0, samples, 0
        while number < _MAX_BATCHES and size < self._cache.ahead_bytes:
            if number == len(self._batches):
                self._batches.append((position, list(self._chunks_of(position, plan))))
            for wanted in self._batches[number][1]:
                if wanted.key not in first:
                    first[wanted.key] = position, wanted
                    size += wanted.record.bytes
            position, number = position + plan.batch_size, number + 1
        return first

"""Which texts are computed together: sorted, so that neighbours begin alike, and cut into rows.

texts ─ sort ─┬─ many with a long common beginning: a group that reads it once
              └─ the rest: one group without
a group ─ families (neighbours that share most of themselves) ─ rows ─ batches of like length
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

ROW_TOKENS = 128
"""Short texts share a row up to this many tokens: a row's attention costs its length squared."""

LONG_BEGINNINGS = (1024, 512, 256, 128, 64)
"""Lengths from which a beginning may be worth reading by itself, tried in this order."""


@dataclass
class Row:
    """Trees of tokens as `models.forest.Forest` wants them, and which texts they are."""

    tokens: Ids
    depths: Ids
    ends: Ids
    lengths: Ids
    texts: list[tuple[int, Ids]] = field(default_factory=list)
    """Number of each text, and the index in the row of each of its tokens behind the group's
    beginning."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Group:
    """Rows of texts that all begin with `beginning`, longest first."""

    beginning: Ids
    rows: list[Row]


def plan(
    texts: Sequence[Ids], num_free: Sequence[int], *, batch_tokens: int, share: bool
) -> list[Group]:
    """The groups that `texts` (token ids, none empty) are computed in, every text in one row.

    `num_free[i]` tokens of text i may be part of a beginning that is computed apart; of the others
    the values are wanted. A group of its own has to fill a batch. `share` false computes each text
    by itself, equal ones excepted.
    """
    order = sorted(range(len(texts)), key=lambda i: _sort_key(texts[i]))
    shared = [0, *(_common(texts[a], texts[b], share) for a, b in zip(order, order[1:]))]
    groups = []
    others: list[Row] = []
    start = 0
    for first, last, length in _long_runs(texts, num_free, order, shared, batch_tokens):
        others += _rows(texts, order, shared, range(start, first), 0)
        rows = _rows(texts, order, shared, range(first, last), length)
        groups.append(Group(texts[order[first]][:length], rows))
        start = last
    others += _rows(texts, order, shared, range(start, len(order)), 0)
    groups.append(Group(np.empty(0, np.int64), others))
    for group in groups:
        group.rows.sort(key=len, reverse=True)
    return [group for group in groups if group.rows]


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """`rows`, which come longest first, as many at a time as `batch_tokens` has room for.

    At least one. One that is much shorter than the first begins a batch of its own, so that little
    is padding.
    """
    batch: list[Row] = []
    for row in rows:
        if batch:
            longest = len(batch[0])
            full = (len(batch) + 1) * longest > batch_tokens
            uneven = len(row) < 0.75 * longest and 2 * len(batch) * longest > batch_tokens
            if full or uneven:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _sort_key(text: Ids) -> bytes:
    """Bytes that sort as the ids do."""
    return text.astype(">u4").tobytes()


def _common(a: Ids, b: Ids, share: bool) -> int:
    """How many tokens two texts begin with in common; without `share` all or none."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    common = int(differ.argmax()) if differ.any() else length
    return common if share or common == len(a) == len(b) else 0


def _long_runs(
    texts: Sequence[Ids],
    num_free: Sequence[int],
    order: Sequence[int],
    shared: Sequence[int],
    batch_tokens: int,
) -> list[tuple[int, int, int]]:
    """(first, last, length) of neighbours whose first `length` tokens are worth computing once."""
    runs: list[tuple[int, int, int]] = []
    lcp = np.asarray(shared)
    free = np.asarray([num_free[i] for i in order])
    sizes = np.asarray([len(texts[i]) for i in order])
    taken = np.zeros(len(order), bool)
    for threshold in LONG_BEGINNINGS:
        alike = (lcp >= threshold) & ~taken
        alike[1:] &= ~taken[:-1]
        borders = np.flatnonzero(np.diff(np.concatenate(([0], alike.view(np.int8), [0]))))
        for begin, end in borders.reshape(-1, 2).tolist():
            first, last = begin - 1, end  # the text before the first likeness belongs to it
            length = int(min(lcp[begin:end].min(), free[first:last].min()))
            new = int(sizes[first] - length + (sizes[begin:end] - lcp[begin:end]).sum())
            if length >= threshold // 2 and new >= batch_tokens:
                runs.append((first, last, length))
                taken[first:last] = True
    return sorted(runs)


def _rows(
    texts: Sequence[Ids], order: Sequence[int], shared: Sequence[int], places: range, beginning: int
) -> list[Row]:
    """Rows of the texts at neighbouring places of the order, each without its beginning."""
    rows: list[_Builder] = []
    for family in _families(texts, order, shared, places, beginning):
        more = sum(len(texts[order[p]]) - beginning - common for p, common in family)
        if not rows or len(rows[-1]) + more > ROW_TOKENS:
            rows.append(_Builder())
        for place, common in family:
            text = texts[order[place]]
            rows[-1].add(order[place], text[beginning:], common, len(text))
    return [row.finish() for row in rows]


def _families(
    texts: Sequence[Ids], order: Sequence[int], shared: Sequence[int], places: range, beginning: int
) -> Iterator[list[tuple[int, int]]]:
    """Neighbours that stay in one row: (place, tokens in common with the place before).

    They share at least half of themselves, and a row gets no longer than it needs to.
    """
    family: list[tuple[int, int]] = []
    cost = longest = 0
    for place in places:
        size = len(texts[order[place]]) - beginning
        common = shared[place] - beginning if place > places[0] else 0
        longest = max(longest, size)
        fits = cost + size - common <= max(ROW_TOKENS, 1.5 * longest)
        if family and (2 * common < size or not fits):
            yield family
            family, cost, longest = [], 0, size
        cost += size - common if family else size
        family.append((place, common))
    if family:
        yield family


class _Builder:
    """A row as it grows."""

    def __init__(self) -> None:
        self._size = 0
        self._path: Ids = np.empty(0, np.int64)
        self._parts: list[tuple[Ids, int, int]] = []
        self._closed: list[tuple[Ids, int]] = []
        self._texts: list[tuple[int, Ids]] = []

    def __len__(self) -> int:
        return self._size

    def add(self, number: int, text: Ids, common: int, length: int) -> None:
        """Append what `text` has more than its first `common` tokens, which the last one has."""
        common = min(common, len(self._path))  # nothing, in a row that only begins
        self._closed.append((self._path[common:], self._size))
        new = np.arange(self._size, self._size + len(text) - common)
        self._path = np.concatenate((self._path[:common], new))
        self._parts.append((text[common:], common, length))
        self._size += len(new)
        self._texts.append((number, self._path))

    def finish(self) -> Row:
        """The row."""
        ends = np.empty(self._size, np.int64)
        for path, end in [*self._closed, (self._path, self._size)]:
            ends[path] = end
        return Row(
            tokens=np.concatenate([part for part, _, _ in self._parts]),
            depths=np.concatenate([np.arange(c, c + len(p)) for p, c, _ in self._parts]),
            ends=ends,
            lengths=np.concatenate([np.full(len(p), length) for p, _, length in self._parts]),
            texts=self._texts,
        )

"""What incremental decoding keeps of the tokens that it has read, in static buffers.

Blocks without a sliding window keep every position. Those with one keep what their window needs
and some more, and move that to the front of their buffer when it is full:

    before   | . . . . . m m w w w |    w: what the next token looks at, m: a margin before it,
    after    | m m w w w . . . . . |    .: looked at no more, or free
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.models.kernels import can_attend

PREFILL_TOKENS = 1024
"""Prompts are read in pieces of this many tokens, which bounds the memory that reading takes."""

MARGIN = 128
"""By so many tokens at least a text can be shortened without being read again."""

NOWHERE = sys.maxsize
"""The first position of a row whose positions are just being moved: it holds none."""


def cache_room(window: int | None, max_length: int) -> int:
    """How many positions a block with such a window has memory for, in texts of `max_length`."""
    # A token looks at window - 1 others: one is left, where a row without a next token writes.
    return max_length if window is None else min(max_length, window + MARGIN + PREFILL_TOKENS)


def kv_cache_bytes(
    config: ModelConfig, batch_size: int, max_length: int, bytes_per_value: int = 2
) -> int:
    """Size of a key-value cache for `batch_size` sequences of `max_length` tokens."""
    positions = sum(cache_room(window, max_length) for window in config.windows)
    per_position = sum(heads * width for heads, width in config.cached_heads)
    return positions * per_position * batch_size * bytes_per_value


class KVCache:
    """Room for `max_length` positions of `batch_size` sequences; `length` positions are filled.

    `blocks` are the tensors of each block, those of `config.cached_heads`, [B, heads, room, width]:
    keys and values, or under latent attention one vector that both are made from. A forward of the
    decoder with the cache appends its tokens, `at_once` of them at a time. Setting `length` back,
    where the cache still `keeps` what is needed there, forgets the positions behind it (their
    memory is overwritten by the next forward). `context` is how long a text read in pieces is in
    all, where that is known: some kinds of rotation depend on it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.blocks = [
            tuple(
                torch.zeros(
                    (batch_size, heads, cache_room(window, max_length), width),
                    device=device,
                    dtype=dtype,
                )
                for heads, width in config.cached_heads
            )
            for window in config.windows
        ]
        self.windows = config.windows
        moves = [w for w in config.windows if w and cache_room(w, max_length) < max_length]
        self.window = moves[0] if moves else None
        """That of the blocks whose buffers are shorter than a text, if there are such."""
        self.max_length, self.context, self._length = max_length, 0, 0
        self.at_once = PREFILL_TOKENS if moves else sys.maxsize
        # Which position is at index 0 of those buffers, for each row.
        self._first = [0] * batch_size
        self._rows = range(batch_size)

    @property
    def length(self) -> int:
        """How many positions each of its sequences has."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if length == 0:
            self._begin_at(self._rows, 0)
            self.context = 0
        assert self.keeps(length), "the positions before it are there"
        self._length = length

    def keeps(self, length: int, row: int | None = None) -> bool:
        """Whether a row (unset: each) still has all that a token behind `length` others needs."""
        if self.window is None or length == 0:
            return True
        rows = self._rows if row is None else [self._rows[row]]
        return max(self._first[r] for r in rows) <= max(0, length + 1 - self.window)

    def part(self, start: int, stop: int, length: int = 0) -> KVCache:
        """The same memory of its sequences from `start` to `stop`, as a cache of its own.

        It goes on behind their first `length` positions; what they hold behind these is forgotten.
        """
        own = KVCache.__new__(KVCache)
        own.blocks = [tuple(tensor[start:stop] for tensor in block) for block in self.blocks]
        own.windows, own.window, own.at_once = self.windows, self.window, self.at_once
        own.max_length, own.context = self.max_length, 0
        own._first, own._rows = self._first, self._rows[start:stop]
        own.length = length
        return own

    def behind(self, count: int) -> list[LayerCache]:
        """What each block reads, and adds `count` positions to."""
        self.make_room(range(len(self._rows)), self._length, count)
        return [
            LayerCache(block, self.index(0, window, self._length))
            for block, window in zip(self.blocks, self.windows, strict=True)
        ]

    def index(self, row: int, window: int | None, position: int) -> int:
        """Where the blocks with such a window have a position of a row in their buffers."""
        if self.window is None or window is None:
            return position
        return position - self._first[self._rows[row]]

    def make_room(self, rows: range, length: int, count: int) -> None:
        """Have `count` positions fit behind the `length` of each of these rows, which are alike."""
        assert length + count <= self.max_length, f"no room for {length + count} positions"
        if self.window is None:
            return
        first = self._first[self._rows[rows.start]]
        assert first <= max(0, length + 1 - self.window), "the positions before it are there"
        if length + count - first < cache_room(self.window, self.max_length):
            return
        owners = self._rows[rows.start : rows.stop]
        start = max(first, length + 1 - self.window - MARGIN)
        # An interrupt can fall between two tensors.
        self._begin_at(owners, NOWHERE)
        for block, window in zip(self.blocks, self.windows, strict=True):
            for tensor in block if window is not None else ():
                own = tensor[rows.start : rows.stop]
                own[:, :, : length - start] = own[:, :, start - first : length - first].clone()
        self._begin_at(owners, start)

    def _begin_at(self, owners: range, position: int) -> None:
        for owner in owners:
            self._first[owner] = position

    def copy_from(self, other: KVCache, length: int) -> None:
        """Take over the first `length` positions of a shorter cache of the same model and rows."""
        self._first[:] = other._first
        for block, source, window in zip(self.blocks, other.blocks, self.windows, strict=True):
            count = max(0, other.index(0, window, length))
            for tensor, kept in zip(block, source, strict=True):
                tensor[:, :, :count] = kept[:, :, :count]
        self._length = length


class LayerCache:
    """One block's tensors [B, heads, room, width], of which the first `start` are filled."""

    __slots__ = ("start", "tensors")

    def __init__(self, tensors: tuple[Tensor, ...], start: int) -> None:
        self.tensors, self.start = tensors, start

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """All that is kept so far, as views, after adding a [B, heads, T, width] to each tensor."""
        end = self.start + new[0].shape[2]
        for tensor, part in zip(self.tensors, new, strict=True):
            tensor[:, :, self.start : end] = part
        return self.first(end)

    def first(self, count: int) -> tuple[Tensor, ...]:
        """So many positions, as views."""
        return tuple(tensor[:, :, :count] for tensor in self.tensors)


class RowsCache:
    """One more token for each of some sequences of a cache, which have lengths of their own.

    `rows` are the sequences, and `positions` those of their new tokens; None where a row has none,
    and what is computed in its place is written to the end of its buffers, which nobody reads.
    Without the kernel (`direct`), which is not for what is `compiled`, the rows follow one another.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        rows: Sequence[int],
        positions: Sequence[int | None],
        *,
        compiled: bool = False,
    ) -> None:
        device = cache.blocks[0][0].device
        self.cache = cache
        self.direct = not compiled and attends_directly(config, cache)
        self.positions = torch.tensor([position or 0 for position in positions], device=device)
        self.rows = torch.tensor(rows, device=device)
        self._span = slice(rows[0], rows[0] + len(rows))
        for row, position in zip(rows, positions, strict=True):
            if position is not None:
                cache.make_room(range(row, row + 1), position, 1)
        self._places: dict[int | None, tuple[Tensor, int]] = {}
        for window in dict.fromkeys(config.windows):
            indices = [
                None if position is None else cache.index(row, window, position)
                for row, position in zip(rows, positions, strict=True)
            ]
            end = max(index for index in indices if index is not None) + 1
            last = cache_room(window, cache.max_length) - 1
            places = [last if index is None else index for index in indices]
            alike = places == list(positions)  # making a tensor takes a while
            self._places[window] = (
                self.positions if alike else torch.tensor(places, device=device),
                end,
            )

    def masks(self, windows: Collection[int | None]) -> dict[int | None, Tensor | None]:
        """Who looks at what in blocks with each kind of window, bool [n, 1, 1, end] (None: all)."""
        if self.direct or (len(self.positions) == 1 and not any(windows)):
            return dict.fromkeys(windows)
        masks: dict[int | None, Tensor | None] = {}
        for window in windows:
            places, end = self._places[window]
            # Rows without a token look at something, too: at nothing would be no number.
            behind = places.clamp(max=end - 1).unsqueeze(1) - torch.arange(
                end, device=places.device
            )
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            masks[window] = seen[:, None, None]
        return masks

    def layer(self, index: int) -> LayerRows:
        """What block `index` reads and writes."""
        tensors = self.cache.blocks[index]
        if not self.direct:
            tensors = tuple(tensor[self._span] for tensor in tensors)
        places, end = self._places[self.cache.windows[index]]
        return LayerRows(tensors, self.rows, places, end, self.direct)


def attends_directly(config: ModelConfig, cache: KVCache) -> bool:
    """Whether there is a kernel for steps with this cache, which takes any rows in any order."""
    return not torch.is_grad_enabled() and can_attend(config, cache.blocks[0])


class LayerRows:
    """One block's tensors, and at which index of them (`places`) the new token of each row goes.

    `direct`: there is a kernel that turns, writes and attends in one. The tensors are then those of
    all sequences, [B, heads, room, width], else those of the n computed.
    """

    __slots__ = ("direct", "end", "places", "rows", "tensors")

    def __init__(
        self, tensors: tuple[Tensor, ...], rows: Tensor, places: Tensor, end: int, direct: bool
    ) -> None:
        self.tensors, self.rows, self.places = tensors, rows, places
        self.end, self.direct = end, direct

    @property
    def start(self) -> int:
        """How many tokens are looked at before it, at most."""
        return self.end - 1

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The first `end` positions, as views, after writing a [n, heads, 1, width] to each."""
        row = torch.arange(len(self.places), device=self.places.device)
        for tensor, part in zip(self.tensors, new, strict=True):
            tensor[row, :, self.places] = part.squeeze(2).to(tensor.dtype)
        return tuple(tensor[:, :, : self.end] for tensor in self.tensors)

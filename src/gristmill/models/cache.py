"""What incremental decoding keeps of the tokens that it has read, in static buffers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.models.kernels import can_attend


class KVCache:
    """Room for `max_length` positions of `batch_size` sequences; `length` positions are filled.

    `tensors` are those of `config.cached_heads`, each [layers, B, heads, max_length, width]: keys
    and values, or under latent attention one vector that both are made from. One forward of the
    decoder with the cache appends its tokens; setting `length` back forgets the positions behind
    it (their memory is overwritten by the next forward). `context` is how long a text read in
    pieces is in all, where that is known: some kinds of rotation depend on it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = config.num_layers
        self.tensors = tuple(
            torch.zeros((layers, batch_size, heads, max_length, width), device=device, dtype=dtype)
            for heads, width in config.cached_heads
        )
        self.max_length = max_length
        self.length = 0
        self.context = 0

    def part(self, start: int, stop: int) -> KVCache:
        """The same memory of its sequences from `start` to `stop`, as an empty cache of its own."""
        own = KVCache.__new__(KVCache)
        own.tensors = tuple(tensor[:, start:stop] for tensor in self.tensors)
        own.max_length, own.length, own.context = self.max_length, 0, 0
        return own

    def layer(self, index: int) -> LayerCache:
        """What block `index` reads and appends to."""
        return LayerCache(tuple(tensor[index] for tensor in self.tensors), self.length)

    def copy_from(self, other: KVCache, length: int) -> None:
        """Take over the first `length` positions of a cache of the same model and batch size."""
        for tensor, source in zip(self.tensors, other.tensors, strict=True):
            tensor[..., :length, :] = source[..., :length, :]
        self.length = length

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0


class LayerCache:
    """One block's tensors [B, heads, max_length, width], the first `start` positions filled."""

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

    `rows` are the sequences, and `positions` those of their new tokens. What a sequence holds at
    its position and behind it means nothing: it is written over. Without the kernel (`direct`) the
    rows follow one another.
    """

    def __init__(
        self, config: ModelConfig, cache: KVCache, rows: Sequence[int], positions: Sequence[int]
    ) -> None:
        device = cache.tensors[0].device
        self.cache, self.end = cache, max(positions) + 1
        self.direct = attends_directly(config, cache)
        self.positions = torch.tensor(positions, device=device)
        self.rows = torch.tensor(rows, device=device)
        self._span = slice(rows[0], rows[0] + len(rows))

    def masks(self, windows: Collection[int | None]) -> dict[int | None, Tensor | None]:
        """Who looks at what in blocks with each kind of window, bool [n, 1, 1, end] (None: all)."""
        if self.direct or (len(self.positions) == 1 and not any(windows)):
            return dict.fromkeys(windows)
        keys = torch.arange(self.end, device=self.positions.device)
        behind = self.positions.unsqueeze(1) - keys
        return {
            window: (behind >= 0 if window is None else (behind >= 0) & (behind < window))[
                :, None, None
            ]
            for window in windows
        }

    def layer(self, index: int) -> LayerRows:
        """What block `index` reads and writes."""
        tensors = tuple(tensor[index] for tensor in self.cache.tensors)
        if not self.direct:
            tensors = tuple(tensor[self._span] for tensor in tensors)
        return LayerRows(tensors, self.rows, self.positions, self.end, self.direct)


def attends_directly(config: ModelConfig, cache: KVCache) -> bool:
    """Whether there is a kernel for steps with this cache, which takes any rows in any order."""
    return not torch.is_grad_enabled() and can_attend(config, cache.tensors)


class LayerRows:
    """One block's tensors and where the new tokens' rows go.

    `direct`: there is a kernel that turns, writes and attends in one. The tensors are then those of
    all sequences, [B, heads, max_length, width], else those of the n computed.
    """

    __slots__ = ("direct", "end", "positions", "rows", "tensors")

    def __init__(
        self, tensors: tuple[Tensor, ...], rows: Tensor, positions: Tensor, end: int, direct: bool
    ) -> None:
        self.tensors, self.rows, self.positions = tensors, rows, positions
        self.end, self.direct = end, direct

    @property
    def start(self) -> int:
        """How many tokens were there before, at most."""
        return self.end - 1

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The first `end` positions, as views, after writing a [n, heads, 1, width] to each."""
        row = torch.arange(len(self.positions), device=self.positions.device)
        for tensor, part in zip(self.tensors, new, strict=True):
            tensor[row, :, self.positions] = part.squeeze(2).to(tensor.dtype)
        return tuple(tensor[:, :, : self.end] for tensor in self.tensors)

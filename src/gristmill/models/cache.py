"""What incremental decoding keeps of the tokens that it has read, in static buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig


class KVCache:
    """Room for `max_length` positions of `batch_size` sequences; `length` positions are filled.

    `tensors` are those of `config.cached_heads`, each [layers, B, heads, max_length, width]: keys
    and values, or under latent attention one vector that both are made from. One forward of the
    decoder with the cache appends its tokens; setting `length` back forgets the positions behind
    it (their memory is overwritten by the next forward).
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
        return tuple(tensor[:, :, :end] for tensor in self.tensors)

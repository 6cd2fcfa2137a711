"""The key-value cache of incremental decoding: static buffers of the grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig


class KVCache:
    """Room for `max_length` positions of `batch_size` sequences; `length` positions are filled.

    One forward of the decoder with the cache appends its tokens; setting `length` back forgets the
    positions behind it (their memory is overwritten by the next forward).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (config.num_layers, batch_size, config.kv_heads, max_length, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    def layer(self, index: int) -> LayerCache:
        """What block `index` reads and appends to."""
        return LayerCache(self.keys[index], self.values[index], self.length)

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0


class LayerCache:
    """One block's keys and values [B, kv_heads, max_length, head_size], `start` of them filled."""

    __slots__ = ("keys", "start", "values")

    def __init__(self, keys: Tensor, values: Tensor, start: int) -> None:
        self.keys, self.values, self.start = keys, values, start

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, as views, after adding [B, kv_heads, T, head_size]."""
        end = self.start + keys.shape[2]
        self.keys[:, :, self.start : end] = keys
        self.values[:, :, self.start : end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

"""Query, key and value in one matrix on disk, apart in the model: cut and joined, exactly.

The fused rows go head group by head group: the group's query heads, its key head, its value head.
With as many groups as heads this is GPT-NeoX's layout, q0 k0 v0 q1 k1 v1 …
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig


def split(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of a fused weight [rows, d] or bias [rows]."""
    per_group = config.num_heads // config.kv_heads
    rest = fused.shape[1:]
    grouped = fused.view(config.kv_heads, per_group + 2, config.head_size, *rest)
    q, k, v = torch.split(grouped, [per_group, 1, 1], dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """The fused weight or bias of query, key and value; the inverse of `split`."""
    rest = parts[0].shape[1:]
    grouped = [part.view(config.kv_heads, -1, config.head_size, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def rows(config: ModelConfig) -> int:
    """Rows of the fused matrix."""
    return (config.num_heads + 2 * config.kv_heads) * config.head_size

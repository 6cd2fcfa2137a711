"""Causal self-attention with grouped queries, through torch's fused SDPA kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models.cache import LayerCache
from gristmill.models.rope import apply_rope


class Attention(nn.Module):
    """Queries, keys and values are separate matrices: LoRA, tensor parallel and Muon want them so.

    Grouped queries (arXiv:2305.13245): query head h reads key-value head h // (heads / kv_heads).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        d, q_width = config.hidden_size, config.num_heads * config.head_size
        kv_width = config.kv_heads * config.head_size
        self.q = nn.Linear(d, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, d, bias=config.attention_out_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """What each token of x [B, T, d] gathers from itself and those before it, [B, T, d].

        `mask` (bool, broadcast to [B, heads, T, keys], True = may look) replaces the causal rule.
        """
        heads = (*x.shape[:2], -1, self.head_size)
        q = apply_rope(self.q(x).view(heads), cos, sin).transpose(1, 2)
        k = apply_rope(self.k(x).view(heads), cos, sin).transpose(1, 2)
        v = self.v(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q [B, heads, T, D] over k, v [B, kv_heads, S, D]: [B, heads, T, D].

    Causal when `mask` is None and T > 1 (then S = T); a single query sees all S keys.
    """
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    if length == 1 and mask is None:
        # One token a sequence: the query heads of a group are rows of one product over their keys,
        # two to four times as fast on a CPU as a kernel call per head.
        rows = F.scaled_dot_product_attention(q.reshape(batch, groups, -1, dim), k, v)
        return rows.reshape(batch, heads, 1, dim)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != groups
    )

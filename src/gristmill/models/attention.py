"""Causal self-attention with grouped queries, through torch's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
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
        mask: Any = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """What each token of x [B, T, d] gathers from itself and those before it, [B, T, d].

        `mask` (bool, broadcast to [B, heads, T, keys], True = may look; or a `BlockMask`) replaces
        the causal rule.
        """
        heads = (*x.shape[:2], -1, self.head_size)
        q = apply_rope(self.q(x).view(heads), cos, sin).transpose(1, 2)
        k = apply_rope(self.k(x).view(heads), cos, sin).transpose(1, 2)
        v = self.v(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Attention of q [B, heads, T, D] over k, v [B, kv_heads, S, D]: [B, heads, T, D].

    Causal when `mask` is None and T > 1 (then S = T); a single query sees all S keys.
    """
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=mask, enable_gqa=heads != groups)
    if length == 1 and mask is None:
        # One token a sequence: the query heads of a group are rows of one product over their keys,
        # two to four times as fast on a CPU as a kernel call per head.
        rows = F.scaled_dot_product_attention(q.reshape(batch, groups, -1, dim), k, v)
        return rows.reshape(batch, heads, 1, dim)
    if length == k.shape[2] and _backward_is_better_written_out(q):
        return _CausalAttention.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != groups
    )


WRITTEN_OUT_LENGTH, WRITTEN_OUT_ROWS = 1024, 128
"""Longest sequence whose backward pass is written out, and how many queries it takes at a time."""


def _backward_is_better_written_out(q: Tensor) -> bool:
    """Whether products and a compiled softmax beat the backward kernel of SDPA.

    On a CPU they take 0.6 of its time at 512 tokens, as long at 2,048, and more when not compiled.
    """
    short = 1 < q.shape[2] <= WRITTEN_OUT_LENGTH
    return short and q.device.type == "cpu" and q.requires_grad and torch.compiler.is_compiling()


class _CausalAttention(torch.autograd.Function):
    """SDPA forward; backward from the inputs again, a block of queries after the other.

    With P = softmax(S), S = scale * Q K^T: dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)),
    dQ = scale * dS K, dK = scale * dS^T Q. Nothing of size T x T outlives a block of queries.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of q [B, heads, T, D] over k, v [B, kv_heads, T, D].

        A `mask`, bool [B, 1, T, T], must not let a token look ahead; without one it is causal.
        """
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        ctx.save_for_backward(q, k, v, out, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v."""
        q, k, v, out, mask = ctx.saved_tensors
        length, scale, shape = q.shape[2], q.shape[3] ** -0.5, (k.shape[1], -1)
        q, out, grad = (x.unflatten(1, shape) for x in (q, out, grad))
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        shared = (grad.float() * out.float()).sum(-1, keepdim=True)
        position = torch.arange(length, dtype=torch.float32, device=q.device)
        grad_q, parts_k, parts_v = [], [], []
        for start in range(0, length, WRITTEN_OUT_ROWS):
            end = min(start + WRITTEN_OUT_ROWS, length)
            queries, upper = q[..., start:end, :], grad[..., start:end, :]
            keys, values = k[..., :end, :], v[..., :end, :]
            if mask is None:
                hidden = position[:end] > position[start:end].unsqueeze(1)
            else:
                hidden = ~mask[:, None, :, start:end, :end]
            scores = (queries @ keys.transpose(-1, -2)).float() * scale
            weights = torch.where(hidden, -torch.inf, scores).softmax(-1)
            slope = (upper @ values.transpose(-1, -2)).float() - shared[..., start:end, :]
            slope = (weights * slope * scale).to(q.dtype)
            grad_q.append(slope @ keys)
            parts_k.append(slope.transpose(-1, -2) @ queries)
            parts_v.append(weights.to(q.dtype).transpose(-1, -2) @ upper)
        grad_q = torch.cat(grad_q, -2).flatten(1, 2)
        return grad_q, _sum_parts(parts_k), _sum_parts(parts_v), None


def _sum_parts(parts: list[Tensor]) -> Tensor:
    """The sum of [B, kv_heads, group, T_i, D] over parts (each longer than the last) and group."""
    sums = []
    for number in range(len(parts)):
        rows = slice(number * WRITTEN_OUT_ROWS, (number + 1) * WRITTEN_OUT_ROWS)
        total = sum(part[..., rows, :].float() for part in parts[number:])
        sums.append(total.sum(2))
    return torch.cat(sums, -2).to(parts[0].dtype)

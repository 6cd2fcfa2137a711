"""Causal self-attention with grouped queries, through torch's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models.cache import LayerCache, LayerRows
from gristmill.models.kernels import attend_rows, can_keep, keep, project
from gristmill.models.norm import build_norm
from gristmill.models.prompt import Prompt
from gristmill.models.rope import apply_rope


class Attention(nn.Module):
    """Queries, keys and values are separate matrices: LoRA, tensor parallel and Muon want them so.

    Grouped queries (arXiv:2305.13245): query head h reads key-value head h // (heads / kv_heads).
    Queries and keys may be normalised (arXiv:2302.05442), each head or all together.
    """

    def __init__(self, config: ModelConfig, window: int | None = None) -> None:
        super().__init__()
        self.head_size, self.window = config.head_size, window
        self.scale, self.softcap = config.score_scale, config.attention_softcap
        self.clip, self.norm_all = config.qkv_clip, config.qk_norm == "full"
        d, q_width = config.hidden_size, config.num_heads * config.head_size
        kv_width = config.kv_heads * config.head_size
        self.q = nn.Linear(d, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, d, bias=config.attention_out_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            self.q_norm = build_norm(config, q_width if self.norm_all else self.head_size)
            self.k_norm = build_norm(config, kv_width if self.norm_all else self.head_size)
        self.prompt: Prompt | None = None
        """Trained vectors that are looked at besides; for the block to set."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Any = None,
        cache: LayerCache | LayerRows | None = None,
    ) -> Tensor:
        """What each token of x [B, T, d] gathers from itself and those before it, [B, T, d].

        `cos` and `sin` rotate queries and keys (None: not in this block). `mask` (bool, broadcast
        to [B, heads, T, keys], True = may look; or a `BlockMask`) replaces the causal rule.
        """
        q, k, v = project(x, self.q, self.k, self.v)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        if self.norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))
        if not self.norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = None if cos is None or sin is None else (cos, sin)
        if isinstance(cache, LayerRows) and cache.direct:
            out = attend_rows(
                q,
                k,
                v,
                tables,
                (*cache.tensors, cache.rows, cache.places),
                window=self.window,
                scale=self.scale or self.head_size**-0.5,
                softcap=self.softcap,
            )
            return self.o(out.flatten(2))
        q, k, v = _turned_and_kept(q, k, v, tables, cache)
        if self.window is not None and cache is not None and mask is None and q.shape[2] == 1:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        out = attend(q, k, v, mask, scale=self.scale, softcap=self.softcap)
        out = out.transpose(1, 2).flatten(2)
        return self.o(out) if self.prompt is None else self.prompt(self, q, out)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of vectors x [B, n, d] without a position, [B, kv_heads, n, D] each."""
        k, v = self.k(x), self.v(x)
        if self.clip is not None:
            k, v = k.clamp(-self.clip, self.clip), v.clamp(-self.clip, self.clip)
        if self.norm_all:
            k = self.k_norm(k)
        k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (k, v))
        if not self.norm_all:
            k = self.k_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)


def _turned_and_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    cache: LayerCache | LayerRows | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, heads, D] as [B, heads, T, D], turned, and k and v with those of the cache."""
    if isinstance(cache, LayerCache) and tables:
        place = (cache.tensors, cache.start)
        if can_keep(q, k, v, tables, *place):
            return keep(q, k, v, tables, *place), *cache.first(cache.start + q.shape[1])
    if tables is not None:
        q, k = apply_rope(q, *tables), apply_rope(k, *tables)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return (q, k, v) if cache is None else (q, *cache.append(k, v))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of q [B, heads, T, D] over k [B, kv_heads, S, D], v [B, kv_heads, S, E]: [.., E].

    Causal when `mask` is None and T > 1 (then S = T); a single query sees all S keys. Scores are
    multiplied with `scale` (1 / sqrt(D)) and go through softcap * tanh(scores / softcap).
    """
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            assert softcap is not None
            return softcap * torch.tanh(score / softcap)

        return flex_attention(
            q,
            k,
            v,
            score_mod=None if softcap is None else capped,
            block_mask=mask,
            scale=scale,
            enable_gqa=heads != groups,
        )
    if softcap is not None:
        return _attend_capped(q, k, v, mask, scale or dim**-0.5, softcap)
    if length == 1:
        # One token a sequence: the query heads of a group are rows of one product over their keys,
        # two to four times as fast on a CPU as a kernel call per head.
        rows = q.reshape(batch, groups, -1, dim)
        rows = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        return rows.reshape(batch, heads, 1, v.shape[-1])
    if length == k.shape[2] and dim == v.shape[-1] and _backward_is_better_written_out(q):
        q, k = q.to(v.dtype), k.to(v.dtype)
        return _CausalAttention.apply(q, k, v, mask, scale or dim**-0.5)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != groups
    )


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention written out: no fused kernel of SDPA caps scores (arXiv:2408.00118, section 2)."""
    length, keys = q.shape[2], k.shape[2]
    q = q.unflatten(1, (k.shape[1], -1))
    scores = (q @ k.unsqueeze(2).transpose(-1, -2)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    elif length > 1:
        future = torch.ones(length, keys, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


WRITTEN_OUT_LENGTH, WRITTEN_OUT_KEYS = 2048, 256
"""Longest sequence whose backward pass is written out, and how many keys it takes at a time."""

OFFSET_WIDTH = 32
"""Columns that an offset takes inside a product."""


def _backward_is_better_written_out(q: Tensor) -> bool:
    """Whether products and a compiled softmax beat the backward kernel of SDPA.

    On a CPU they take 0.55 of its time at 512 tokens and 0.75 at 1,024 and 2,048, compiled.
    """
    short = 1 < q.shape[2] <= WRITTEN_OUT_LENGTH
    return short and q.device.type == "cpu" and q.requires_grad and torch.compiler.is_compiling()


class _CausalAttention(torch.autograd.Function):
    """The forward pass of SDPA on a CPU; backward a block of keys after the other.

    With the logarithms L of the softmax's sums and P = exp(S - L), S = scale * Q K^T:
    dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dK = scale * dS^T Q, dQ = scale * dS K
    (arXiv:2307.08691, section 3.1). Nothing of size T x T outlives a block of keys, which only
    the queries from its first key on look at.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of q [B, heads, T, D] over k, v [B, kv_heads, T, D], all of one dtype.

        A `mask`, bool [B or 1, 1, T, T], must not let a token look ahead; without one it is causal.
        """
        group = q.shape[1] // k.shape[1]
        added = None
        if mask is not None:
            added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        # What F.scaled_dot_product_attention calls; it keeps the logarithms to itself.
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            is_causal=mask is None,
            attn_mask=added,
            scale=scale,
        )
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, log_sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of q, k and v."""
        q, k, v, out, log_sums, mask = ctx.saved_tensors
        length, scale, shape = q.shape[2], ctx.scale, (k.shape[1], -1)
        q, out, grad, log_sums = (x.unflatten(1, shape) for x in (q, out, grad, log_sums))
        k, v, log_sums = k.unsqueeze(2), v.unsqueeze(2), log_sums.unsqueeze(-1)
        queries_in, keys_in, missing = _with_offset(q, k, log_sums / -scale)
        shared = (grad.float() * out.float()).sum(-1, keepdim=True)
        position = torch.arange(length, dtype=torch.float32, device=q.device)
        parts_q, grad_k, grad_v = [], [], []
        for start in range(0, length, WRITTEN_OUT_KEYS):
            end = min(start + WRITTEN_OUT_KEYS, length)
            queries, upper = q[..., start:, :], grad[..., start:, :]
            keys, values = k[..., start:end, :], v[..., start:end, :]
            if mask is None:
                hidden = position[start:end] > position[start:].unsqueeze(1)
            else:
                hidden = ~mask[:, None, :, start:, start:end]
            scores = queries_in[..., start:, :] @ keys_in[..., start:end, :].transpose(-1, -2)
            scores = (scores.float() + missing[..., start:, :]) * scale
            weights = torch.where(hidden, -torch.inf, scores).exp()
            slope = (upper @ values.transpose(-1, -2)).float() - shared[..., start:, :]
            slope = (weights * slope * scale).to(q.dtype)
            parts_q.append(slope @ keys)
            grad_k.append((slope.transpose(-1, -2) @ queries).sum(2))
            grad_v.append((weights.to(q.dtype).transpose(-1, -2) @ upper).sum(2))
        grad_q = _sum_parts(parts_q).flatten(1, 2)
        return grad_q, torch.cat(grad_k, -2), torch.cat(grad_v, -2), None, None


def _with_offset(q: Tensor, k: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose products are q k^T plus an offset [.., T, 1], and its remainder.

    Products are rounded to the type of their factors. If an offset of -50 were added afterwards,
    what should be a weight of 1 would come out of bf16 as anything from 0.9 to 1.1; with it inside,
    what matters is near 0 when it is rounded. It goes in as a column in that type, among as many
    of zeros as make the width one that products are fast with.
    """
    column = offset.to(q.dtype)
    zeros = q.new_zeros(()).expand(*q.shape[:-1], OFFSET_WIDTH - 1)
    keys = F.pad(k, (0, OFFSET_WIDTH))
    keys[..., k.shape[-1]] = 1
    return torch.cat([q, column, zeros], -1), keys, offset - column.to(offset.dtype)


def _sum_parts(parts: list[Tensor]) -> Tensor:
    """The sum over parts [.., T_i, D], which end together and begin a block of keys later each."""
    sums = []
    for number in range(len(parts)):
        rows = [
            part[..., (number - i) * WRITTEN_OUT_KEYS : (number - i + 1) * WRITTEN_OUT_KEYS, :]
            for i, part in enumerate(parts[: number + 1])
        ]
        sums.append(sum([part.float() for part in rows[1:]], rows[0].float()))
    return torch.cat(sums, -2).to(parts[0].dtype)

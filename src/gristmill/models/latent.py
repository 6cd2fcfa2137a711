"""Multi-head latent attention: keys and values of all heads from one small vector per token.

Of x, the input of a token, kv_down makes a latent vector c and one rotated key r for all heads.
kv_up, for head h the matrices U (keys) and W (values), expands c; q = [p; s] is the head's query:

    key [U c; r], value W c       expanded: p·(U c) + s·r, then the sum of weights * (W c)
    key [c; r],   value c         absorbed: (U^T p)·c + s·r, then W (the sum of weights * c)

Both are the same numbers (arXiv:2405.04434, section 2.1). The first is cheap for long inputs, the
second reads only what the cache holds: kv_lora_rank + qk_rope_head_dim numbers per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models.attention import attend
from gristmill.models.cache import LayerCache
from gristmill.models.kernels import FewRowsLinear
from gristmill.models.norm import build_norm
from gristmill.models.rope import apply_rope


class LatentAttention(nn.Module):
    """Multi-head latent attention; queries may come from a small vector as well (q_down, q_up)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent = config.latent_attention
        assert latent is not None, "the configuration has no latent_attention"
        d, heads = config.hidden_size, config.num_heads
        inner = replace(config, norm_eps=latent.norm_eps)
        self.heads, self.scale, self.softcap = heads, config.score_scale, config.attention_softcap
        self.rank, self.rope = latent.kv_lora_rank, latent.qk_rope_head_dim
        self.nope, self.values = latent.qk_nope_head_dim, latent.v_head_dim
        self.narrow_queries = latent.q_lora_rank is not None
        if latent.q_lora_rank is None:
            self.q = nn.Linear(d, heads * config.head_size, bias=False)
        else:
            self.q_down = nn.Linear(d, latent.q_lora_rank, bias=False)
            self.q_norm = build_norm(inner, latent.q_lora_rank)
            self.q_up = nn.Linear(latent.q_lora_rank, heads * config.head_size, bias=False)
        self.kv_down = nn.Linear(d, self.rank + self.rope, bias=False)
        self.kv_norm = build_norm(inner, self.rank)
        self.kv_up = nn.Linear(self.rank, heads * (self.nope + self.values), bias=False)
        self.o = nn.Linear(heads * self.values, d, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Any = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """What each token of x [B, T, d] gathers from itself and those before it, [B, T, d].

        `cos` and `sin` rotate the last part of queries and the shared key (None: not in this
        block). `mask` (bool, broadcast to [B, heads, T, keys], True = may look; or a `BlockMask`)
        replaces the causal rule.
        """
        q = self.q_up(self.q_norm(self.q_down(x))) if self.narrow_queries else self.q(x)
        plain, turned = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), -1)
        latents, key = self.kv_down(x).unsqueeze(2).split((self.rank, self.rope), -1)
        if cos is not None and sin is not None:
            turned, key = apply_rope(turned, cos, sin), apply_rope(key, cos, sin)
        # One row for each token, [B, 1, T, rank + rope]: what the cache holds.
        rows = torch.cat((self.kv_norm(latents), key), -1).transpose(1, 2)
        if cache is not None:
            (rows,) = cache.append(rows)
        if cache is not None and cache.start > 0 and self._absorbs(x.shape[1]):
            out = self._absorbed(plain, turned, rows, mask)
        else:
            out = self._expanded(plain, turned, rows, mask)
        return self.o(out.flatten(2))

    def _absorbs(self, length: int) -> bool:
        """Whether reading the rows as they are takes fewer products than expanding them all.

        Expanding takes rank * (nope + values) products a row and head, and then saves
        2 rank - nope - values for each of the queries. One query never makes up for it. But where
        something is around kv_up (LoRA), its weight is not all that it does.
        """
        if type(self.kv_up) not in (nn.Linear, FewRowsLinear):
            return False
        expanded = self.nope + self.values
        return length * (2 * self.rank - expanded) <= self.rank * expanded

    def _expanded(self, plain: Tensor, turned: Tensor, rows: Tensor, mask: Any) -> Tensor:
        """Values [B, T, heads, values] that queries [B, T, heads, nope] and [.., rope] gather."""
        latents, key = rows.split((self.rank, self.rope), -1)
        expanded = self.kv_up(latents.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = expanded.split((self.nope, self.values), -1)
        q = torch.cat((plain, turned), -1).transpose(1, 2)
        k = torch.cat((k, key.expand(-1, self.heads, -1, -1).to(k.dtype)), -1)
        narrower = k.shape[-1] - self.values
        if narrower > 0 and v.device.type == "cpu":
            # The kernel for CPUs wants equal widths; what runs instead keeps all T * T weights.
            v = F.pad(v, (0, narrower))
        out = attend(q, k, v, mask, scale=self.scale, softcap=self.softcap)
        return out[..., : self.values].transpose(1, 2)

    def _absorbed(self, plain: Tensor, turned: Tensor, rows: Tensor, mask: Any) -> Tensor:
        """The same, with kv_up applied to queries and results instead of to the rows.

        All heads read the same rows, so that tokens and heads are one axis of two plain products.
        """
        up = self.kv_up.weight.view(self.heads, -1, self.rank)
        keys, values = up.split((self.nope, self.values), 1)
        q = torch.cat((torch.einsum("bthn,hnr->bthr", plain, keys), turned), -1)
        rows = rows.squeeze(1)
        scores = (q.flatten(1, 2) @ rows.transpose(1, 2)).float() * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.unflatten(1, q.shape[1:3])
            scores = scores.masked_fill(~mask.transpose(1, 2), -torch.inf).flatten(1, 2)
        out = scores.softmax(-1).to(rows.dtype) @ rows[..., : self.rank]
        return torch.einsum("bthr,hvr->bthv", out.unflatten(1, q.shape[1:3]), values)

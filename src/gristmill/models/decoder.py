"""The one decoder. Every family is this class with other values in its `ModelConfig`.

    tokens ─ embed ─┬─ block 0 ─ … ─ block n-1 ─ norm ─┬─ head ─ logits
                    │                                  └─ linear cross-entropy ─ summed loss
    positions ─ rope tables (once, shared by all blocks)

A block, with x the residual stream:

    sequential (Llama)                       parallel (GPT-NeoX)
    x = x + attn(attn_norm(x))               x = x + attn(attn_norm(x)) + mlp(mlp_norm(x))
    x = x + mlp(mlp_norm(x))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models.attention import Attention
from gristmill.models.cache import KVCache, LayerCache
from gristmill.models.check import check_config
from gristmill.models.documents import document_mask, positions_within
from gristmill.models.loss import linear_cross_entropy
from gristmill.models.rope import rope_tables


def build_norm(config: ModelConfig) -> nn.Module:
    """A normalisation of the residual stream: RMSNorm (arXiv:1910.07467) or LayerNorm."""
    kind = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return kind(config.hidden_size, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = nn.Linear(d, inner, bias=bias)
        self.up = nn.Linear(d, inner, bias=bias)
        self.down = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each token of x [B, T, d] on its own, [B, T, d]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GELU(nn.Module):
    """Plain feed-forward with the exact GELU: down(gelu(up(x))) (arXiv:1606.08415)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up = nn.Linear(d, inner, bias=bias)
        self.down = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each token of x [B, T, d] on its own, [B, T, d]."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward around the residual stream; compiled on its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attn_norm = build_norm(config)
        self.attn = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = {"swiglu": SwiGLU, "gelu": GELU}[config.mlp](config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Any = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The residual stream x [B, T, d] after this block."""
        attended = self.attn(self.attn_norm(x), cos, sin, mask, cache)
        if self.parallel:
            return x + (attended + self.mlp(self.mlp_norm(x)))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A causal language model; builds on any device, meta included (weights then come later).

    Parameter names: embed.weight, layers.{i}.{attn_norm,mlp_norm}, layers.{i}.attn.{q,k,v,o},
    layers.{i}.mlp.{gate,up,down}, norm, head.weight (absent when the embedding is the head).
    """

    def __init__(self, config: ModelConfig) -> None:
        check_config(config)
        super().__init__()
        self.config = config
        self.compiled = False
        """Whether blocks and the loss's softmax are compiled; for the one who does it to set."""
        # Without torch's own initial values: they are replaced anyway, and making them on the meta
        # device imports the compiler (0.8 s).
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_rows(self) -> Tensor:
        """The whole output head, [vocab_size, d]: the embedding where they are one."""
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    @property
    def head_weight(self) -> Tensor:
        """Rows of the output head that stand for a token, [token_ids, d]."""
        return self.head_rows[: self.config.token_ids]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        z_loss: float = 0.0,
        num_logits: int | None = None,
    ) -> Tensor:
        """Logits [B, T, token_ids] in compute dtype, or the summed loss when targets are given.

        tokens, targets, positions: int64 [B, T]; targets of -100 count nothing. `documents` [B, T]
        keeps attention and positions inside each (see `documents.py`). With a cache the tokens
        continue what it holds. `num_logits` keeps the last so many positions' logits only.
        """
        hidden = self.hidden(tokens, positions=positions, documents=documents, cache=cache)
        if targets is not None:
            return linear_cross_entropy(
                hidden.flatten(0, 1),
                self.head_rows,
                targets.flatten(),
                z_loss=z_loss,
                num_token_ids=self.config.token_ids,
                compiled=self.compiled,
            )
        if num_logits is not None:
            hidden = hidden[:, hidden.shape[1] - num_logits :]
        return F.linear(hidden, self.head_weight)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normalised residual stream before the head, [B, T, d]."""
        start = 0 if cache is None else cache.length
        length = tokens.shape[1]
        if documents is not None:
            assert cache is None, "documents are for training, a cache is for one text a row"
            mask = document_mask(documents, compiled=self.compiled)
            positions = positions_within(documents)
        else:
            mask = _continuation_mask(start, length, tokens.device)
        if positions is None:
            positions = torch.arange(start, start + length, device=tokens.device)
        cos, sin = rope_tables(self.config, positions)
        x = self.embed(tokens)
        for index, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, None if cache is None else cache.layer(index))
        if cache is not None:
            cache.length += length
        return self.norm(x)


def _continuation_mask(start: int, length: int, device: torch.device) -> Tensor | None:
    """Who sees whom when several tokens follow a filled cache; None where SDPA needs no mask."""
    if start == 0 or length == 1:
        return None
    rows = torch.arange(start, start + length, device=device)
    return torch.arange(start + length, device=device) <= rows.unsqueeze(1)

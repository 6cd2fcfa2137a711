"""The one decoder. Every family is this class with other values in its `ModelConfig`.

    tokens ─ embed ─┬─ block 0 ─ … ─ block n-1 ─ norm ─┬─ head ─ logits
                    │                                  └─ linear cross-entropy ─ summed loss
    positions ─ rope tables (once, shared by all blocks)

A block, with x the residual stream; a normalisation that a model lacks does nothing:

    sequential (Llama)                             parallel (GPT-NeoX)
    x = x + attn_post_norm(attn(attn_norm(x)))     x = x + attn(attn_norm(x)) + mlp(mlp_norm(x))
    x = x + mlp_post_norm(mlp(mlp_norm(x)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models import kernels
from gristmill.models.attention import Attention
from gristmill.models.cache import KVCache, LayerCache, LayerRows, RowsCache
from gristmill.models.check import check_config
from gristmill.models.latent import LatentAttention
from gristmill.models.loss import IGNORE, VocabularyShard, linear_cross_entropy
from gristmill.models.masks import attention_mask, lengths_within, mask_between, positions_within
from gristmill.models.mlp import build_mlp
from gristmill.models.moe import Load, MixtureOfExperts, count_visits
from gristmill.models.norm import build_norm
from gristmill.models.prompt import Prompt
from gristmill.models.rope import rope_tables
from gristmill.util.errors import UserError


class Block(nn.Module):
    """Attention and feed-forward around the residual stream; compiled on its own."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_norm
        self.window, self.rotates = config.windows[layer], config.rotates[layer]
        self.has_experts = config.expert_layers[layer]

        def norm(present: bool) -> nn.Module:
            return build_norm(config) if present else nn.Identity()

        self.attn_norm = norm(config.pre_norm)
        if config.latent_attention is not None:
            self.attn: nn.Module = LatentAttention(config)
        else:
            self.attn = Attention(config, self.window)
            if config.prompt_layers[layer]:
                self.attn.prompt = Prompt(config)
        self.attn_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm and not config.shared_norm)
        if self.has_experts:
            self.mlp: nn.Module = MixtureOfExperts(config)
        else:
            self.mlp = build_mlp(config)
        self.mlp_post_norm = norm(config.post_norm)
        self.is_plain = kernels.is_plain(config) and not self.has_experts

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Any = None,
        cache: LayerCache | LayerRows | None = None,
    ) -> tuple[Tensor, Load | None]:
        """The residual stream x [B, T, d] after this block, and in training its experts' load."""
        if isinstance(cache, LayerRows) and cache.direct and self.is_plain:
            y = self._decode(x, None if cos is None or sin is None else (cos, sin), cache)
            if y is not None:
                return y, None
        normed = self.attn_norm(x)
        attended = self.attn_post_norm(self.attn(normed, cos, sin, mask, cache))
        if self.parallel:
            out, load = self.feed_forward(normed if self.shared_norm else self.mlp_norm(x))
            return x + (attended + out), load
        x = x + attended
        out, load = self.feed_forward(self.mlp_norm(x))
        return x + self.mlp_post_norm(out), load

    def _decode(
        self, x: Tensor, tables: tuple[Tensor, Tensor] | None, cache: LayerRows
    ) -> Tensor | None:
        """One token of each sequence through the kernel of a whole block, if it has that."""
        own, attn, mlp = self._modules, self.attn, self.mlp._modules
        parts = attn._modules
        return kernels.block(
            x,
            (own["attn_norm"], own["mlp_norm"]),
            (*(parts[name] for name in "qkvo"), mlp["gate"], mlp["up"], mlp["down"]),
            tables,
            (*cache.tensors, cache.rows, cache.places),
            window=attn.window,
            scale=attn.scale or attn.head_size**-0.5,
            softcap=attn.softcap,
        )

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Load | None]:
        """Each token of x [B, T, d] on its own, [B, T, d], and the load of experts, if any."""
        return self.mlp(x) if self.has_experts else (self.mlp(x), None)


class SequenceShard(Protocol):
    """Positions of every row that this process computes, where several share them."""

    start: int

    def positions(self, length: int, device: torch.device) -> Tensor:
        """They, of rows of `length` tokens, int64 [T]."""

    def key_positions(self, length: int, device: torch.device) -> Tensor:
        """The positions of what `append` returns, int64 [length]."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """What attention looks at: tensors [B, heads, T, width] of all processes."""


class Decoder(nn.Module):
    """A causal language model; builds on any device, meta included (weights then come later).

    Parameter names: embed, layers.{i}.{attn_norm,mlp_norm}, layers.{i}.attn.{q,k,v,o},
    layers.{i}.mlp.{gate,up,down}, norm, head (absent when the embedding is the head);
    `counts.parameter_shapes` has them all.
    """

    def __init__(self, config: ModelConfig) -> None:
        check_config(config)
        super().__init__()
        self.config = config
        self.own_config = config
        """What this process computes of each block: fewer heads where several share them."""
        self.compiled = False
        """Whether blocks and the loss's softmax are compiled; for the one who does it to set."""
        self.linear: Callable[..., Tensor] = F.linear
        """How the head multiplies; for the one who has something faster."""
        self.vocabulary: VocabularyShard | None = None
        """Which rows of embedding and head this process has; unset: all."""
        self.head_adapter: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        """From what the head reads [.., d] to inner [.., r] and b [vocab_size, r]: inner @ b.T is
        added to the logits. For who trains an adapter of the head to set."""
        self.sequence: SequenceShard | None = None
        """Which positions this process computes when it is given targets; unset: all."""
        self.visits: Tensor | None = None
        """Where experts have a selection bias: how many of the tokens with a target have visited
        each in the last forward pass in training, int64 [layers with experts, E]."""
        # Without torch's own initial values: they are replaced anyway, and making them on the meta
        # device imports the compiler (0.8 s).
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        if config.positions == "learned":
            table = torch.empty(config.max_seq_length, config.hidden_size)
            self.positions = nn.Embedding.from_pretrained(table, freeze=False)
        self.embed_norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)

    @property
    def head_rows(self) -> Tensor:
        """The whole output head, [vocab_size, d]: the embedding where they are one."""
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    @property
    def own_head(self) -> tuple[Tensor, Tensor | None]:
        """The rows of head and bias that this process has."""
        weight, bias = self.head_rows, self.head_bias
        if self.vocabulary is None:
            return weight, bias
        local = self.vocabulary.local
        return local(weight), None if bias is None else local(bias)

    @property
    def head_weight(self) -> Tensor:
        """Rows of the output head that stand for a token, [token_ids, d]."""
        return self.head_rows[: self.config.token_ids]

    @property
    def head_bias(self) -> Tensor | None:
        """The bias of the whole output head, [vocab_size], if it has one."""
        return None if self.config.tie_embeddings else self.head.bias

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | RowsCache | None = None,
        z_loss: float = 0.0,
        num_logits: int | None = None,
    ) -> Tensor:
        """Logits [B, T, token_ids] in compute dtype, or the summed loss when targets are given.

        tokens, targets, positions: int64 [B, T]; targets of -100 count nothing. `documents` [B, T]
        keeps attention and positions inside each (see `masks.py`). With a cache the tokens
        continue what it holds. `num_logits` keeps the last so many positions' logits only. In
        training the loss of a model with experts includes, per counted target, `balance_loss`
        times the mean over its blocks of how uneven their load is. Where processes share positions
        the loss is that of this one's.
        """
        config = self.config
        if self.sequence is not None and targets is not None:
            own = self.sequence.positions(tokens.shape[1], tokens.device)
            targets = targets[:, own]
            hidden, loads = self._run_shared(tokens, positions, documents, self.sequence)
        else:
            hidden, loads = self._run(tokens, positions, documents, cache)
        if targets is not None:
            weight, bias = self.own_head
            loss = linear_cross_entropy(
                hidden.flatten(0, 1),
                weight,
                targets.flatten(),
                bias=bias,
                softcap=config.logit_softcap,
                z_loss=z_loss,
                num_token_ids=config.token_ids,
                compiled=self.compiled,
                shard=self.vocabulary,
                low_rank=self._low_rank(hidden.flatten(0, 1)),
            )
            return self._balanced(loss, loads, targets != IGNORE) if loads else loss
        if num_logits is not None:
            hidden = hidden[:, hidden.shape[1] - num_logits :]
        return self.logits(hidden)

    def _balanced(self, loss: Tensor, loads: Sequence[Load], counted: Tensor) -> Tensor:
        """The loss of the `counted` tokens with that of how uneven the load of experts is.

        Their visits are left in `visits`.
        """
        moe = self.config.moe
        assert moe is not None
        chosen = [load.experts for load in loads if load.experts is not None]
        if chosen:
            self.visits = count_visits(chosen, counted, moe.num_experts)
        losses = [load.balance for load in loads if load.balance is not None]
        if not losses:
            return loss
        return loss + moe.balance_loss * torch.stack(losses).mean() * counted.sum()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., token_ids] of the normalised residual stream [..., d]."""
        logits = self._logits(hidden)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of every row that stands for a token."""
        count = self.config.token_ids
        if self.vocabulary is not None:
            return self.vocabulary.gather(F.linear(hidden, *self.own_head))[..., :count]
        bias = None if self.head_bias is None else self.head_bias[:count]
        logits = self.linear(hidden, self.head_weight, bias)
        low_rank = self._low_rank(hidden)
        if low_rank is None:
            return logits
        inner, b = low_rank
        return logits + F.linear(inner, b[:count]).to(logits.dtype)

    def _low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """What an adapter of the head adds to the logits, as two factors."""
        return None if self.head_adapter is None else self.head_adapter(hidden)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | RowsCache | None = None,
    ) -> Tensor:
        """The normalised residual stream before the head, [B, T, d]."""
        return self._run(tokens, positions, documents, cache)[0]

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: KVCache | RowsCache | None,
    ) -> tuple[Tensor, list[Load]]:
        """The normalised residual stream, and in training the load of each layer of experts."""
        assert cache is None or documents is None, "a cache is for one text a row"
        if isinstance(cache, RowsCache):
            return self._run_rows(tokens, cache)
        start = 0 if cache is None else cache.length
        length = tokens.shape[1]
        context: int | Tensor = start + length
        if documents is None and positions is None:
            self._check_fits(start + length)
        if cache is not None:
            assert start + length <= cache.max_length, f"no room for {start + length} positions"
            context = cache.context = max(start + length, cache.context)
            if length > cache.at_once:
                return self._run_parts(tokens, positions, cache), []
        if documents is not None:
            positions, context = positions_within(documents), lengths_within(documents)
        elif positions is None:
            positions = torch.arange(start, start + length, device=tokens.device)
        caches = None if cache is None else cache.behind(length)
        starts = dict.fromkeys(self.config.windows, 0)
        if caches is not None:
            starts = {w: kept.start for w, kept in zip(self.config.windows, caches, strict=True)}
        masks = self._masks(starts, length, tokens.device, documents)
        tables = self._tables(positions, context)
        out = self._through_blocks(self._embedded(tokens, positions), tables, masks, caches)
        if cache is not None:
            cache.length += length
        return out

    def _run_parts(self, tokens: Tensor, positions: Tensor | None, cache: KVCache) -> Tensor:
        """The residual stream of more tokens than a cache takes at once, part by part."""
        parts = tokens.split(cache.at_once, 1)
        theirs = [None] * len(parts) if positions is None else positions.split(cache.at_once, -1)
        return torch.cat(
            [self._run(*part, None, cache)[0] for part in zip(parts, theirs, strict=True)], 1
        )

    def _run_rows(self, tokens: Tensor, cache: RowsCache) -> tuple[Tensor, list[Load]]:
        """The same of one more token for each of several sequences of different lengths."""
        positions = cache.positions.unsqueeze(1)
        tables = self._tables(positions, positions + 1)
        masks = cache.masks(dict.fromkeys(self.config.windows))
        caches = [cache.layer(i) for i in range(len(self.layers))]
        return self._through_blocks(self._embedded(tokens, positions), tables, masks, caches)

    def _run_shared(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        shard: SequenceShard,
    ) -> tuple[Tensor, list[Load]]:
        """The same for this process's positions of rows that several share, [B, T / ranks, d]."""
        length, device = tokens.shape[1], tokens.device
        own, keys = shard.positions(length, device), shard.key_positions(length, device)
        context: int | Tensor = length
        if documents is not None:
            positions, context = positions_within(documents), lengths_within(documents)[:, own]
        elif positions is None:
            self._check_fits(length)
        positions = own if positions is None else positions[..., own]
        masks = {
            window: mask_between(own, keys, window=window, documents=documents)
            for window in dict.fromkeys(self.config.windows)
        }
        x = self._embedded(tokens[:, own], positions)
        return self._through_blocks(
            x, self._tables(positions, context), masks, [shard] * len(self.layers)
        )

    def _through_blocks(
        self,
        x: Tensor,
        tables: dict[bool, tuple[Tensor, Tensor]],
        masks: dict[int | None, Any],
        caches: Sequence[Any] | None,
    ) -> tuple[Tensor, list[Load]]:
        """x after all blocks and the last norm, and in training the load of their experts."""
        loads = []
        for index, block in enumerate(self.layers):
            cos, sin = tables[block.window is not None] if block.rotates else (None, None)
            cache = None if caches is None else caches[index]
            x, load = block(x, cos, sin, masks[block.window], cache)
            if load is not None:
                loads.append(load)
        return self.norm(x), loads

    def _check_fits(self, length: int) -> None:
        """UserError where positions are learned, and fewer than `length`."""
        limit = self.config.max_seq_length
        if self.config.positions == "learned" and length > limit:
            raise UserError(
                f"{self.config.name} has learned positions for {limit:,} tokens, and {length:,} "
                f"were given. Give at most {limit:,} at once, or use a model with a longer context."
            )

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before the first block, [B, T, d]."""
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            # Rounded to the type of the weights, as models that have it were trained.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype).item()
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        return self.embed_norm(x)

    def _masks(
        self,
        starts: dict[int | None, int],
        length: int,
        device: torch.device,
        documents: Tensor | None,
    ) -> dict[int | None, Any]:
        """The attention mask of the blocks with each kind of window, which have kept so many."""
        plain = documents is None and self.config.attention_softcap is None
        on_gpu = self.compiled and device.type == "cuda"
        return {
            window: attention_mask(
                start,
                length,
                device,
                window=window,
                documents=documents,
                blocks=on_gpu and not (plain and (window is None or window >= length)),
            )
            for window, start in starts.items()
        }

    def _tables(self, positions: Tensor, length: int | Tensor) -> dict[bool, tuple[Tensor, Tensor]]:
        """Rotary tables of the blocks without a sliding window (False), and with it (True)."""
        if not any(self.config.rotates):
            return {}
        everywhere = rope_tables(self.config, positions, length)
        if self.config.rope_local_theta is None:
            return {False: everywhere, True: everywhere}
        return {False: everywhere, True: rope_tables(self.config, positions, length, local=True)}

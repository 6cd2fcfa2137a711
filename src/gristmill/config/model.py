"""Every switch of the one decoder. No behaviour depends on a name: a family is a set of values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for a context longer than the one trained on."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"] = "llama3"
    """linear (arXiv:2306.15595), dynamic NTK, YaRN (arXiv:2309.00071), Llama 3 (arXiv:2407.21783),
    LongRoPE (arXiv:2402.13753)."""
    factor: float = 1.0
    """How much longer the context is than the original one."""
    original_max_seq_length: int = 8192
    """Context length before scaling."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / low_freq_factor are scaled by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / high_freq_factor are left as they are."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often within the original context are left as they are."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often within the original context are scaled by `factor`."""
    truncate: bool = True
    """yarn: the two borders above are rounded to whole dimensions."""
    mscale: float | None = None
    """yarn: weight of the growth of attention scores in the rotary tables."""
    mscale_all_dim: float | None = None
    """yarn: weight of that growth over whole heads."""
    attention_factor: float | None = None
    """yarn, longrope: multiplies cosine and sine; from `factor` when unset."""
    short_factors: tuple[float, ...] | None = None
    """longrope: divisors of each frequency up to the original context."""
    long_factors: tuple[float, ...] | None = None
    """longrope: divisors of each frequency in longer contexts."""

    def __post_init__(self) -> None:
        """Equal scalings are equal: a factor that is the usual one becomes unset."""
        if self.attention_factor == self.usual_attention_factor:
            object.__setattr__(self, "attention_factor", None)

    @property
    def usual_attention_factor(self) -> float:
        """What `attention_factor` is when unset, so that attention is as sharp in a long context.

        YaRN (arXiv:2309.00071, section 3.4): 0.1 ln(factor) + 1, or the ratio of two such terms,
        whose logarithms have weights. LongRoPE (arXiv:2402.13753):
        sqrt(1 + ln(factor) / ln(original)). Others: 1.
        """
        grows = min(self.factor, self.original_max_seq_length) > 1
        if self.kind not in ("yarn", "longrope") or not grows:
            return 1.0
        growth = math.log(self.factor)
        if self.kind == "longrope":
            return math.sqrt(1 + growth / math.log(self.original_max_seq_length))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * growth + 1) / (0.1 * self.mscale_all_dim * growth + 1)
        return 0.1 * growth + 1

    @property
    def table_factor(self) -> float:
        """What cosine and sine are multiplied with, resolved."""
        if self.attention_factor is None or self.kind not in ("yarn", "longrope"):
            return self.usual_attention_factor
        return self.attention_factor


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """A feed-forward layer of experts, of which each token visits a few (arXiv:2101.03961)."""

    num_experts: int
    """Routed experts in a layer."""
    num_experts_per_token: int = 2
    """Experts that a token visits."""
    intermediate_size: int
    """Width of one expert."""
    num_shared_experts: int = 0
    """Experts that every token visits, computed as one of that many times the width."""
    num_dense_layers: int = 0
    """Leading blocks that have an ordinary feed-forward layer instead."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes the router's logits into scores."""
    normalize: bool = True
    """Whether the weights of a token's experts add up to one."""
    scale: float = 1.0
    """Multiplies the weights of the experts."""
    selection_bias: bool = False
    """A bias per expert that takes part in the choice and not in the weights (arXiv:2408.15664)."""
    num_groups: int = 1
    """Groups that the experts are divided into; a token visits the best ones only."""
    num_groups_per_token: int = 1
    """Groups that a token may visit."""
    group_score: Literal["max", "top2"] = "max"
    """What a group is worth: its best expert's score, or the sum of its two best."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss in training."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Keys and values from one small vector per token, all that is cached (arXiv:2405.04434)."""

    kv_lora_rank: int
    """Width of the vector that keys and values are made from."""
    q_lora_rank: int | None = None
    """Width of the vector that queries are made from; straight from the input when unset."""
    qk_nope_head_dim: int
    """Width of a query and key head's part without position."""
    qk_rope_head_dim: int
    """Width of the rotated part; its key is shared by all heads."""
    v_head_dim: int
    """Width of a value head."""
    norm_eps: float = 1e-6
    """Added to the variance when those vectors are normalised."""


@dataclass(frozen=True, kw_only=True)
class AdaptionPrompt:
    """Trained vectors that the last blocks' attention looks at besides (arXiv:2303.16199)."""

    length: int
    """Vectors of a block."""
    num_layers: int
    """So many blocks have them, the last ones."""
    projected: bool = True
    """What they give goes through the output projection, like the rest."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Values default to a Llama-style block.

    A pattern of `True` and `False` goes over the blocks and begins again at its end.
    """

    name: str = "custom"
    """What the model is called in lists and run directories."""
    family: str = "llama"
    """The table in `models/zoo` that holds its weight names and its Hugging Face form."""
    vocab_size: int = 32000
    """Rows of the embedding on disk."""
    num_token_ids: int | None = None
    """Rows that stand for a token (the tokenizer's largest id + 1); all rows when unset."""
    max_seq_length: int = 2048
    """Longest context in tokens."""
    num_layers: int = 12
    """Number of blocks."""
    hidden_size: int = 768
    """Width of the residual stream."""

    embedding_scale: float = 1.0
    """Multiplies the embeddings."""
    embedding_norm: bool = False
    """Normalise the embeddings."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary (arXiv:2104.09864), or one learned vector for each position of the context."""
    tie_embeddings: bool = False
    """The output head is the embedding (one parameter)."""
    head_bias: bool = False
    """Bias on the output head."""
    logit_softcap: float | None = None
    """Logits go through cap * tanh(logits / cap)."""

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of the residual stream."""
    norm_eps: float = 1e-5
    """Added to the variance in every normalisation."""
    norm_weight: bool = True
    """Normalisations have a weight."""
    norm_bias: bool = True
    """layernorm: normalisations have a bias."""
    norm_unit_offset: bool = False
    """rmsnorm: the weight is what is added to one."""
    pre_norm: bool = True
    """Attention and feed-forward read the normalised residual stream."""
    post_norm: bool = False
    """What attention and feed-forward add to the residual stream is normalised."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same input (GPT-NeoX) instead of one after the other."""
    shared_norm: bool = False
    """parallel_residual: one normalisation for both."""

    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; as many as query heads when unset."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_heads when unset."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections."""
    qkv_clip: float | None = None
    """Queries, keys and values are cut to this range around zero."""
    attention_out_bias: bool = False
    """Bias on the attention output projection."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalise queries and keys: no, each head, or all heads together."""
    attention_scale: float | None = None
    """Multiplies the scores; 1 / sqrt(head width) when unset."""
    attention_softcap: float | None = None
    """Scores go through cap * tanh(scores / cap)."""
    sliding_window: int | None = None
    """Tokens that a token sees in blocks with a sliding window, itself among them."""
    sliding_pattern: tuple[bool, ...] = (True,)
    """Which blocks have the sliding window, if there is one."""
    latent_attention: LatentAttention | None = None
    """Multi-head latent attention instead of grouped queries."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Leading share of each head that is rotated (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling | None = None
    """Change of the rotary frequencies for long contexts, if any."""
    rope_local_theta: float | None = None
    """Base, without scaling, in blocks with a sliding window; as in the others when unset."""
    rope_pattern: tuple[bool, ...] = (True,)
    """Which blocks rotate queries and keys."""

    mlp: Literal["gated", "plain"] = "gated"
    """Feed-forward: down(act(gate(x)) * up(x)) (arXiv:2002.05202), or down(act(up(x)))."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
    """The function `act`; relu2 is the square of relu (arXiv:2109.08668)."""
    intermediate_size: int = 3072
    """Width of the feed-forward layer."""
    mlp_bias: bool = False
    """Bias on the feed-forward projections."""
    moe: MixtureOfExperts | None = None
    """Experts instead of one feed-forward layer."""

    adaption_prompt: AdaptionPrompt | None = None
    """An adapter: vectors besides the text that the last blocks look at, if any."""

    bos_token_id: int | None = None
    """Beginning-of-sequence id, for `config.json`."""
    eos_token_id: int | tuple[int, ...] | None = None
    """End-of-sequence id, for `config.json`; where several end a text, all of them."""

    def __post_init__(self) -> None:
        """Equal models are equal: what a value would be when unset becomes unset."""
        if self.num_kv_heads == self.num_heads:
            object.__setattr__(self, "num_kv_heads", None)
        if self.head_dim is not None and self.head_dim * self.num_heads == self.hidden_size:
            object.__setattr__(self, "head_dim", None)
        if isinstance(self.eos_token_id, list | tuple) and len(self.eos_token_id) < 2:
            object.__setattr__(self, "eos_token_id", next(iter(self.eos_token_id), None))

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a query and key head, resolved."""
        if self.latent_attention is not None:
            return self.latent_attention.qk_nope_head_dim + self.latent_attention.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def cached_heads(self) -> tuple[tuple[int, int], ...]:
        """Heads and width of each tensor that a block keeps of a token when decoding."""
        latent = self.latent_attention
        if latent is not None:
            return ((1, latent.kv_lora_rank + latent.qk_rope_head_dim),)
        return ((self.kv_heads, self.head_size),) * 2

    @property
    def token_ids(self) -> int:
        """Rows that loss and sampling use, resolved."""
        return self.num_token_ids or self.vocab_size

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied with, resolved."""
        return self.attention_scale or self.head_size**-0.5

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each block, None where a token sees all before it."""
        window = self.sliding_window
        return tuple(window if on else None for on in self._over_blocks(self.sliding_pattern))

    @property
    def rotates(self) -> tuple[bool, ...]:
        """Whether each block rotates queries and keys."""
        learned = self.positions == "learned"
        return tuple(on and not learned for on in self._over_blocks(self.rope_pattern))

    @property
    def rotates_by_length(self) -> bool:
        """Whether a token's rotation depends on how long its text is, not on its position alone.

        What was computed of the beginning of one text is then of no use to another.
        """
        scaling = self.rope_scaling
        return scaling is not None and scaling.kind in ("dynamic", "longrope")

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each block has experts."""
        dense = self.num_layers if self.moe is None else self.moe.num_dense_layers
        return tuple(layer >= dense for layer in range(self.num_layers))

    @property
    def prompt_layers(self) -> tuple[bool, ...]:
        """Whether each block looks at trained vectors."""
        count = 0 if self.adaption_prompt is None else self.adaption_prompt.num_layers
        return tuple(layer >= self.num_layers - count for layer in range(self.num_layers))

    def _over_blocks(self, pattern: tuple[bool, ...]) -> tuple[bool, ...]:
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

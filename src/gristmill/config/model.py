"""Every switch of the one decoder. No behaviour depends on a name: a family is a set of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling of the rotary embedding (arXiv:2407.21783, section 3.2)."""

    factor: float
    """How much longer the context is than the original one."""
    low_freq_factor: float = 1.0
    """Wavelengths above original / low_freq_factor are scaled by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original / high_freq_factor are left as they are."""
    original_max_seq_length: int = 8192
    """Context length before scaling."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Values default to a Llama-style block."""

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
    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; as many as query heads when unset."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_heads when unset."""
    intermediate_size: int = 3072
    """Width of the feed-forward layer."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention and feed-forward."""
    norm_eps: float = 1e-5
    """Added to the variance in every normalisation."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward: gated SiLU (three matrices) or exact GELU (two matrices)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections."""
    attention_out_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    """Bias on the feed-forward projections."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same input (GPT-NeoX) instead of one after the other."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Leading share of each head that is rotated (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 scaling of the rotary frequencies, if any."""
    tie_embeddings: bool = False
    """The output head is the embedding (one parameter)."""
    bos_token_id: int | None = None
    """Beginning-of-sequence id, for `config.json`."""
    eos_token_id: int | None = None
    """End-of-sequence id, for `config.json`."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a head, resolved."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def token_ids(self) -> int:
        """Rows that loss and sampling use, resolved."""
        return self.num_token_ids or self.vocab_size

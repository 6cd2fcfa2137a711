"""Whether the numbers of a configuration make a model."""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.util.errors import UserError


def check_config(config: ModelConfig) -> None:
    """Raise UserError, naming values and a remedy, when no decoder can be built from `config`."""
    positive = ("vocab_size", "max_seq_length", "hidden_size", "num_heads", "intermediate_size")
    for name in positive:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}. Use a positive number.")
    if config.head_dim is None and config.hidden_size % config.num_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is no multiple of num_heads {config.num_heads}. "
            "Change one of them, or set head_dim."
        )
    if config.num_heads % config.kv_heads:
        raise UserError(
            f"num_heads {config.num_heads} is no multiple of num_kv_heads {config.kv_heads}. "
            "Query heads share key-value heads in equal groups: change one of them."
        )
    rotated = int(config.head_size * config.rope_fraction)
    if not 0 < config.rope_fraction <= 1 or rotated % 2 or not rotated:
        raise UserError(
            f"rope_fraction {config.rope_fraction} rotates {rotated} of a head's "
            f"{config.head_size} values. Pairs are rotated: make it an even number up to all."
        )
    if config.token_ids > config.vocab_size:
        raise UserError(
            f"num_token_ids {config.num_token_ids} is more than vocab_size {config.vocab_size}. "
            f"Set vocab_size to at least {config.num_token_ids}."
        )

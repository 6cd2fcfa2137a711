"""Which models can be trained on which mesh of processes: what no test runs is refused."""

from __future__ import annotations

from collections.abc import Mapping

from gristmill.config.model import ModelConfig
from gristmill.util.errors import UserError


def check_mesh(
    config: ModelConfig, sizes: Mapping[str, int], *, seq_len: int | None = None
) -> None:
    """Raise UserError, naming what would work, where a model cannot be cut over axes of `sizes`."""
    tensor, context = sizes.get("tensor", 1), sizes.get("context", 1)
    if tensor > 1:
        _check_tensor(config, tensor)
    if context > 1:
        _check_context(config, context, seq_len)


def _refuse(axis: str, size: int, why: str, instead: int = 1) -> None:
    raise UserError(
        f"--parallel.{axis} {size}: {why}. Use --parallel.{axis} {instead}; --parallel.shard and "
        "--parallel.replicate take any model.",
        {f"--parallel.{axis}": instead},
    )


def _check_tensor(config: ModelConfig, size: int) -> None:
    words = {
        "latent attention": config.latent_attention is not None,
        "experts": config.moe is not None,
        "norms over all heads together": config.qk_norm == "full",
    }
    for what, has in words.items():
        if has:
            _refuse("tensor", size, f"{config.name} has {what}, which are not cut yet")
    whole = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    fits = max(n for n in range(1, size + 1) if all(value % n == 0 for value in whole.values()))
    for name, value in whole.items():
        if value % size:
            _refuse("tensor", size, f"{name} {value} is no multiple of it", fits)
    rows = -(-config.vocab_size // size)
    if rows * (size - 1) >= config.token_ids:
        _refuse("tensor", size, f"{config.token_ids} tokens are too few to share")


def _check_context(config: ModelConfig, size: int, seq_len: int | None) -> None:
    words = {
        "a load-balancing loss, which needs whole rows": config.moe is not None
        and config.moe.balance_loss > 0,
        "rotary angles that depend on the length of the text": config.rotates_by_length,
    }
    for what, has in words.items():
        if has:
            _refuse("context", size, f"{config.name} has {what}")
    if seq_len is not None and seq_len % (2 * size):
        raise UserError(
            f"--parallel.context {size}: rows of {seq_len} tokens are not cut into {2 * size} "
            "pieces of one length. Use a multiple of that.",
            {"--train.max_seq_length": max(1, seq_len // (2 * size)) * 2 * size},
        )

"""Whether the numbers of a configuration make a model."""

from __future__ import annotations

from gristmill.config.model import MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.util.errors import UserError


def check_config(config: ModelConfig) -> None:
    """Raise UserError, naming values and a remedy, when no decoder can be built from `config`."""
    positive = ("vocab_size", "max_seq_length", "hidden_size", "num_heads", "intermediate_size")
    for name in positive:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}. Use a positive number.")
    latent = config.latent_attention
    if latent is None and config.head_dim is None and config.hidden_size % config.num_heads:
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
    if latent is not None:
        rotated = latent.qk_rope_head_dim
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
    if min(config.num_layers, config.kv_heads - 1) < 0:
        raise UserError(
            f"num_layers is {config.num_layers} and num_kv_heads {config.kv_heads}. "
            "Use positive numbers."
        )
    _check_scaling(config.rope_scaling, rotated)
    _check_parts(config)


def _check_scaling(scaling: RopeScaling | None, rotated: int) -> None:
    """UserError for a change of the rotary frequencies that has no numbers for some of them."""
    if scaling is None:
        return
    if scaling.kind == "longrope":
        counts = [len(f or ()) for f in (scaling.short_factors, scaling.long_factors)]
        if counts != [rotated // 2] * 2:
            raise UserError(
                f"longrope has {counts[0]} short_factors and {counts[1]} long_factors for the "
                f"{rotated // 2} frequencies of a head. Give one for each."
            )
    if scaling.kind == "dynamic" and rotated < 4:
        raise UserError(
            f"dynamic scaling spreads frequencies, and a head that rotates {rotated} values has "
            "one. Choose linear, or wider heads."
        )


def _check_parts(config: ModelConfig) -> None:
    """UserError for parts that do not go together."""
    wrong = {
        "tie_embeddings with head_bias": config.tie_embeddings and config.head_bias,
        "shared_norm without parallel_residual": config.shared_norm
        and not config.parallel_residual,
        "post_norm with parallel_residual": config.post_norm and config.parallel_residual,
        "norm_unit_offset with layernorm": config.norm_unit_offset and config.norm != "rmsnorm",
        "norm_unit_offset without norm_weight": config.norm_unit_offset and not config.norm_weight,
        "moe with a plain mlp": config.moe is not None and config.mlp != "gated",
        "moe with mlp_bias": config.moe is not None and config.mlp_bias,
        "an empty sliding_pattern": not config.sliding_pattern,
        "an empty rope_pattern": not config.rope_pattern,
    }
    if config.latent_attention is not None:
        wrong |= {
            "latent_attention with sliding_window": config.sliding_window is not None,
            "latent_attention with qk_norm": config.qk_norm != "none",
            "latent_attention with qkv_bias": config.qkv_bias,
            "latent_attention with attention_out_bias": config.attention_out_bias,
            "latent_attention with qkv_clip": config.qkv_clip is not None,
            "latent_attention with head_dim": config.head_dim is not None,
            "latent_attention with rope_fraction": config.rope_fraction != 1.0,
            "latent_attention with fewer num_kv_heads": config.kv_heads != config.num_heads,
            "latent_attention with adaption_prompt": config.adaption_prompt is not None,
        }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise UserError(f"The model has {found[0]}, which is not supported. Change one of them.")
    if config.sliding_window is not None and config.sliding_window < 1:
        raise UserError(f"sliding_window is {config.sliding_window}. Use a positive number.")
    if config.moe is not None:
        _check_experts(config.moe)
    prompt = config.adaption_prompt
    if prompt is not None and (prompt.length < 1 or not 0 < prompt.num_layers <= config.num_layers):
        raise UserError(
            f"adaption_prompt has {prompt.length} vectors in {prompt.num_layers} of "
            f"{config.num_layers} blocks. Use at least one of both, and at most all blocks."
        )


def _check_experts(moe: MixtureOfExperts) -> None:
    """UserError when a token cannot visit as many experts as it should."""
    if moe.intermediate_size < 1 or min(moe.num_shared_experts, moe.num_dense_layers) < 0:
        raise UserError(
            f"moe has intermediate_size {moe.intermediate_size}, num_shared_experts "
            f"{moe.num_shared_experts}, num_dense_layers {moe.num_dense_layers}. "
            "Use a positive width, and no negative numbers."
        )
    if not 0 < moe.num_experts_per_token <= moe.num_experts:
        raise UserError(
            f"num_experts_per_token {moe.num_experts_per_token} is not between 1 and num_experts "
            f"{moe.num_experts}. Change one of them."
        )
    if moe.num_groups < 1 or moe.num_experts % moe.num_groups:
        raise UserError(
            f"num_experts {moe.num_experts} is no multiple of num_groups {moe.num_groups}. "
            "Change one of them."
        )
    if not 0 < moe.num_groups_per_token <= moe.num_groups:
        raise UserError(
            f"num_groups_per_token {moe.num_groups_per_token} is not between 1 and num_groups "
            f"{moe.num_groups}. Change one of them."
        )
    reach = moe.num_experts // moe.num_groups * moe.num_groups_per_token
    if moe.num_experts_per_token > reach:
        raise UserError(
            f"num_experts_per_token {moe.num_experts_per_token} is more than the {reach} experts "
            f"of {moe.num_groups_per_token} groups. Raise num_groups_per_token."
        )

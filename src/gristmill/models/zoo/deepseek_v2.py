"""DeepSeek-V2 (arXiv:2405.04434): latent attention, and many small experts beside shared ones.

Rotated values lie in pairs in the files, and in halves in our parameters.
"""

from __future__ import annotations

import math
from typing import Any

from gristmill.config.model import LatentAttention, MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.rope_words import parse_rope
from gristmill.models.zoo.sizes import Fields, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import (
    STANDARD,
    Json,
    Word,
    read_words,
    require,
    without,
    write_words,
)
from gristmill.util.errors import UserError

_EXPERT = "model.layers.{i}.mlp.experts.{e}."
GET_UNQUANTIZED = (
    "Convert them to bf16: python inference/fp8_cast_bf16.py --input-fp8-hf-path SRC "
    "--output-bf16-hf-path DST from https://github.com/deepseek-ai/DeepSeek-V3, and copy "
    "config.json there without quantization_config."
)

WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed.weight",)),
    *layer_weights(
        "model.layers.{i}.",
        "layers.{i}.",
        {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn.q",
            "self_attn.q_a_proj": "attn.q_down",
            "self_attn.q_a_layernorm": "attn.q_norm",
            "self_attn.q_b_proj": "attn.q_up",
            "self_attn.kv_a_proj_with_mqa": "attn.kv_down",
            "self_attn.kv_a_layernorm": "attn.kv_norm",
            "self_attn.kv_b_proj": "attn.kv_up",
            "self_attn.o_proj": "attn.o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
            "mlp.gate": "mlp.router",
            "mlp.shared_experts.gate_proj": "mlp.shared.gate",
            "mlp.shared_experts.up_proj": "mlp.shared.up",
            "mlp.shared_experts.down_proj": "mlp.shared.down",
        },
        q="pairs_per_head",
        q_up="pairs_per_head",
        kv_down="pairs_at_end",
    ),
    Weight(_EXPERT + "gate_proj.weight", ("layers.{i}.mlp.experts.gate.weight",), "experts"),
    Weight(_EXPERT + "up_proj.weight", ("layers.{i}.mlp.experts.up.weight",), "experts"),
    Weight(_EXPERT + "down_proj.weight", ("layers.{i}.mlp.experts.down.weight",), "experts"),
    *layer_weights("", "", {"model.norm": "norm", "lm_head": "head"}),
)

WORDS = without(STANDARD, "num_kv_heads", "head_dim")

CONSTANTS = {"attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}

LATENT = (
    *(Word(w, w) for w in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    Word("q_lora_rank", "q_lora_rank", None),
)
"""Words of the fields of `LatentAttention`."""

EXPERTS = (
    Word("n_routed_experts", "num_experts"),
    Word("num_experts_per_tok", "num_experts_per_token"),
    Word("moe_intermediate_size", "intermediate_size"),
    Word("n_shared_experts", "num_shared_experts"),
    Word("routed_scaling_factor", "scale", 1.0),
    Word("norm_topk_prob", "normalize"),
    Word("aux_loss_alpha", "balance_loss", 0.0),
)
"""Words of the fields of `MixtureOfExperts`."""


def attention_scale(latent: LatentAttention, scaling: RopeScaling | None) -> float | None:
    """What scores are multiplied with where YaRN sharpens whole heads, else None: the usual.

    Of the growth 0.1 * mscale_all_dim * ln(factor) + 1 (arXiv:2309.00071, section 3.4), queries and
    keys take one each.
    """
    if scaling is None or not scaling.mscale_all_dim:
        return None
    growth = 0.1 * scaling.mscale_all_dim * math.log(max(scaling.factor, 1.0)) + 1.0
    head = float(latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    return float(head**-0.5 * growth * growth)


def parse_latent(raw: Json) -> Json:
    """`latent_attention` and the scale of its scores."""
    heads, kv_heads = require(raw, "num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise UserError(
            f"num_key_value_heads is {kv_heads} with latent attention. Supported: {heads}, as many "
            "as num_attention_heads."
        )
    latent = LatentAttention(**read_words(LATENT, raw))
    scale = attention_scale(latent, parse_rope(raw)["rope_scaling"])
    return {"latent_attention": latent, "attention_scale": scale}


def parse_experts(raw: Json, **fields: Any) -> MixtureOfExperts | None:
    """`moe`, with what the architecture implies in `fields`; None where no block has experts."""
    dense = require(raw, "first_k_dense_replace")
    if dense >= require(raw, "num_hidden_layers"):
        return None
    return MixtureOfExperts(num_dense_layers=dense, **read_words(EXPERTS, raw), **fields)


def latent_words(config: ModelConfig) -> Json:
    """The other direction; UserError for a model without latent attention."""
    latent = config.latent_attention
    if latent is None:
        raise UserError(
            "The architecture has latent attention and the model has none. Set latent_attention, "
            "or choose another family."
        )
    return {"num_key_value_heads": config.num_heads, **write_words(LATENT, latent)}


def experts_words(config: ModelConfig) -> Json:
    """The other direction."""
    moe = config.moe
    if moe is None:
        return {"first_k_dense_replace": config.num_layers}
    return {
        "first_k_dense_replace": moe.num_dense_layers,
        "n_group": moe.num_groups,
        "topk_group": moe.num_groups_per_token,
        **write_words(EXPERTS, moe),
    }


def _parse(raw: Json) -> Json:
    method = raw.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"topk_method is {method!r}. Supported: greedy, group_limited_greedy.")
    groups: Fields = {}
    if method == "group_limited_greedy":
        groups = {"num_groups": require(raw, "n_group")}
        groups["num_groups_per_token"] = require(raw, "topk_group")
    return {**parse_latent(raw), "moe": parse_experts(raw, **groups)}


def _words(config: ModelConfig) -> Json:
    grouped = config.moe is not None and config.moe.num_groups > 1
    method = "group_limited_greedy" if grouped else "greedy"
    return {**latent_words(config), **experts_words(config), "topk_method": method}


def yarn(factor: float, mscale: float) -> RopeScaling:
    """YaRN from 4,096 tokens, with the weight `mscale` for tables and heads alike."""
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_seq_length=4096,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


def latent_fields(q_lora_rank: int | None, scaling: RopeScaling | None = None) -> Fields:
    """Attention as in all published sizes, with queries from a vector of `q_lora_rank`."""
    latent = LatentAttention(
        kv_lora_rank=512,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    return {
        "latent_attention": latent,
        "rope_scaling": scaling,
        "attention_scale": attention_scale(latent, scaling),
    }


def shape(layers: int, hidden: int, heads: int, inner: int) -> Fields:
    """The four numbers that make a size, but for its experts."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": inner,
    }


_SIZE = {
    "vocab_size": 102400,
    "max_seq_length": 163840,
    "norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
_LITE = {
    **_SIZE,
    **shape(27, 2048, 16, 10944),
    **latent_fields(None, yarn(40.0, 0.707)),
    "moe": MixtureOfExperts(
        num_experts=64,
        num_experts_per_token=6,
        intermediate_size=1408,
        num_shared_experts=2,
        num_dense_layers=1,
        normalize=False,
        balance_loss=0.001,
    ),
}
_B236 = {
    **_SIZE,
    **shape(60, 5120, 128, 12288),
    **latent_fields(1536, yarn(40.0, 1.0)),
    "moe": MixtureOfExperts(
        num_experts=160,
        num_experts_per_token=6,
        intermediate_size=1536,
        num_shared_experts=2,
        num_dense_layers=1,
        normalize=False,
        scale=16.0,
        num_groups=8,
        num_groups_per_token=3,
        balance_loss=0.001,
    ),
}

FAMILY = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    get_unquantized=GET_UNQUANTIZED,
    weights=WEIGHTS,
    words=WORDS,
    constants={**CONSTANTS, "scoring_func": "softmax", "norm_topk_prob": False},
    parse_more=_parse,
    more_words=_words,
    models=table(
        "deepseek_v2",
        size("DeepSeek-V2", "deepseek-ai/", _B236),
        size("DeepSeek-V2-Chat", "deepseek-ai/", _B236),
        size("DeepSeek-V2.5", "deepseek-ai/", _B236),
        size("DeepSeek-V2-Lite", "deepseek-ai/", _LITE),
        size("DeepSeek-V2-Lite-Chat", "deepseek-ai/", _LITE),
        size("DeepSeek-Coder-V2-Base", "deepseek-ai/", _B236),
        size("DeepSeek-Coder-V2-Instruct", "deepseek-ai/", _B236),
        size("DeepSeek-Coder-V2-Lite-Base", "deepseek-ai/", _LITE),
        size("DeepSeek-Coder-V2-Lite-Instruct", "deepseek-ai/", _LITE),
    ),
)

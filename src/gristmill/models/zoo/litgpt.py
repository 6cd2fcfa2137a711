"""LitGPT's `model_config.yaml` as data, both ways.

The words are the 51 fields of `litgpt.config.Config` (0.5.13) with their defaults, and those of
older generations (`lit_config.json`); what they mean is what `litgpt.model` does with them. Two
switches have no word: LitGPT takes them from the name of the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gristmill.config.model import LatentAttention, MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.models.zoo.family import differences
from gristmill.models.zoo.words import Json, Word, shortest
from gristmill.util.errors import UserError

MARKER = "gristmill"
"""Key in `hf_config` for what LitGPT has no word for and does not need."""
UNIT_OFFSET = "Gemma"
"""Part of a name that makes RMSNorm weights what is added to one."""
WEIGHTLESS = "OLMo"
"""Part of a name that leaves LayerNorm without weights."""

NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm", "FusedRMSNorm": "rmsnorm"}
WORDS = (
    Word("block_size", "max_seq_length", 4096),
    Word("n_layer", "num_layers", 16),
    Word("n_embd", "hidden_size", 4096),
    Word("n_head", "num_heads", 32),
    Word("n_query_groups", "num_kv_heads", None),
    Word("head_size", "head_dim", None),
    Word("intermediate_size", "intermediate_size", None),
    Word("norm_class_name", "norm", "LayerNorm", NORMS),
    Word("norm_eps", "norm_eps", 1e-5),
    Word("parallel_residual", "parallel_residual", True),
    Word("shared_attention_norm", "shared_norm", False),
    Word("bias", ("mlp_bias", "attention_out_bias"), True),
    Word("attention_logit_softcapping", "attention_softcap", None),
    Word("final_logit_softcapping", "logit_softcap", None),
    Word("sliding_window_size", "sliding_window", None),
    Word("rope_base", "rope_theta", 10000),
    Word("rotary_percentage", "rope_fraction", 0.25),
    Word("lm_head_bias", "head_bias", False),
)

# Read by more than a word; the value where the file has none.
DEFAULTS: Json = {
    "name": "",
    "hf_config": {},
    "vocab_size": 50254,
    "padding_multiple": 512,
    "padded_vocab_size": None,
    "norm_qk": False,
    "norm_qk_type": "default",
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "attn_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_indices": None,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "moe_intermediate_size": None,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "n_expert": 0,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "n_topk_groups": None,
    "n_topk_scores_per_group": None,
    "n_expert_per_token": 0,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "scale_embeddings": False,
    "norm_1": True,
    "norm_2": True,
    "latent_attention": None,
    "rope_local_base_freq": None,
    "rope_indices": None,
}
# Older names of a word.
RENAMED = {
    "_norm_class": "norm_class_name",
    "_mlp_class": "mlp_class_name",
    "condense_ratio": "rope_condense_ratio",
}
# Says nothing about the model.
HARMLESS = {"org", "rope_n_elem"}
# Older ways to say which blocks have the sliding window: every one, or every second.
PLACING = ("sliding_window_layer_placing", "sliding_window_layer_stride")
EVERY = {None: 1, 1: 1, 2: 2, "all": 1, "interleaved": 2}

GELU = {"none": "gelu", "tanh": "gelu_tanh"}
QK_NORM = {"default": "head", "olmo2": "full"}
GROUP_SCORE = {1: "max", 2: "top2"}


def parse(raw: Json) -> ModelConfig:
    """Our configuration of a `model_config.yaml` or `lit_config.json`.

    `tie_embeddings` is not in the file: whether the two matrices are one shows in the weights.
    Raises UserError for a word or value that is not supported.
    """
    raw = {RENAMED.get(key, key): value for key, value in raw.items()}
    _check_known(raw)
    values: Json = {}
    for word in WORDS:
        values |= word.read(raw)
    raw = DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * values["hidden_size"]
    if values["head_dim"] == values["hidden_size"] // values["num_heads"]:
        values["head_dim"] = None
    if values["num_kv_heads"] == values["num_heads"]:
        values["num_kv_heads"] = None
    values |= _names(raw) | _norms(raw, values) | _attention(raw, values)
    values |= _rope(raw, values) | _feed_forward(raw, values)
    if raw["scale_embeddings"]:
        values["embedding_scale"] = values["hidden_size"] ** 0.5
    return ModelConfig(**values)


def _check_known(raw: Json) -> None:
    known = {word.theirs for word in WORDS} | set(DEFAULTS) | HARMLESS | set(PLACING)
    unknown = [key for key in raw if key not in known and raw[key] not in (None, False)]
    if unknown:
        raise UserError(
            f"{unknown[0]} is {raw[unknown[0]]!r}, which is not supported. "
            "It may change what the model computes: remove it if it does not."
        )


def _names(raw: Json) -> Json:
    """Name, and rows of the embedding: LitGPT adds rows up to a multiple."""
    own = raw["hf_config"].get(MARKER) or {}
    rows = raw["padded_vocab_size"]
    if rows is None:
        rows = -(-raw["vocab_size"] // raw["padding_multiple"]) * raw["padding_multiple"]
    return {
        "name": own.get("name") or raw["name"] or raw["hf_config"].get("name") or "custom",
        "vocab_size": rows,
        # Tokenizers may have ids above LitGPT's own vocab_size: only ours says which rows count.
        "num_token_ids": own.get("num_token_ids"),
    }


def _norms(raw: Json, values: Json) -> Json:
    name = raw["name"] or raw["hf_config"].get("name") or ""
    layer_norm = values["norm"] == "layernorm"
    return {
        "norm_weight": not (layer_norm and WEIGHTLESS in name),
        "norm_unit_offset": not layer_norm and UNIT_OFFSET in name,
        "pre_norm": _same(raw, "norm_1", "norm_2"),
        "post_norm": _same(raw, "post_attention_norm", "post_mlp_norm"),
    }


def _same(raw: Json, first: str, second: str) -> bool:
    if raw[first] != raw[second]:
        raise UserError(
            f"{first} is {raw[first]} and {second} is {raw[second]}. Supported: both the same."
        )
    return bool(raw[first])


def _attention(raw: Json, values: Json) -> Json:
    out: Json = {"qkv_bias": bool(values["mlp_bias"] or raw["attn_bias"])}
    if raw["norm_qk"]:
        if values["norm"] != "rmsnorm":
            raise UserError("norm_qk is true with LayerNorm. Supported: with RMSNorm.")
        out["qk_norm"] = _one_of(raw, "norm_qk_type", QK_NORM)
    if raw["attention_scores_scalar"] is not None:
        out["attention_scale"] = float(raw["attention_scores_scalar"]) ** -0.5
    if values["sliding_window"] is not None:
        out["sliding_pattern"] = shortest(_windows(raw, values["num_layers"]))
    if raw["latent_attention"]:
        latent = dict(raw["latent_attention"])
        if values["mlp_bias"] or raw["attn_bias"]:
            raise UserError("latent_attention comes with biases. Supported: without.")
        out["latent_attention"] = LatentAttention(**latent, norm_eps=values["norm_eps"])
        out["head_dim"] = None
    return out


def _windows(raw: Json, layers: int) -> tuple[bool, ...]:
    """Which blocks have the sliding window."""
    if raw["sliding_window_indices"] is not None:
        return _indices(raw, "sliding_window_indices", layers)
    stride = 1
    for key in PLACING:
        if raw.get(key) is not None:
            stride = _one_of(raw, key, EVERY)
    return tuple(layer % stride == 0 for layer in range(layers))


def _indices(raw: Json, key: str, layers: int) -> tuple[bool, ...]:
    """A list of 0 and 1, at least one for each block."""
    if len(raw[key]) < layers:
        raise UserError(f"{key} has {len(raw[key])} values for {layers} blocks. Give one for each.")
    return tuple(bool(on) for on in raw[key][:layers])


def _rope(raw: Json, values: Json) -> Json:
    out: Json = {"rope_theta": float(values["rope_theta"])}
    out["rope_scaling"] = _scaling(raw, raw["rope_adjustments"] or {})
    condense = raw["rope_condense_ratio"]
    if condense != 1:
        # Positions divided by a number turn as frequencies divided by it.
        if out["rope_scaling"] is not None or raw["rope_local_base_freq"] is not None:
            raise UserError(
                f"rope_condense_ratio is {condense} beside another change of the rotation. "
                "Supported: one of them."
            )
        out["rope_scaling"] = RopeScaling(kind="linear", factor=float(condense))
    if raw["rope_interleave"] and not raw["latent_attention"]:
        raise UserError("rope_interleave is true. Supported: with latent_attention only.")
    if raw["rope_local_base_freq"] is not None:
        layers = values["num_layers"]
        given = raw["rope_indices"] is not None
        local = _indices(raw, "rope_indices", layers) if given else (True,) * layers
        if values["sliding_window"] is None or local != _windows(raw, layers):
            raise UserError(
                "rope_indices and sliding_window_indices differ. Supported: both the same, "
                "rope_local_base_freq in the blocks with a sliding window."
            )
        out["rope_local_theta"] = float(raw["rope_local_base_freq"])
    return out


def _scaling(raw: Json, adjustments: Json) -> RopeScaling | None:
    if "beta_fast" in adjustments or "beta_slow" in adjustments:
        raise UserError(
            "rope_adjustments are YaRN's, where LitGPT 0.5.13 scales the frequencies that "
            "YaRN (arXiv:2309.00071) keeps and keeps those that it scales. Use the Hugging Face "
            "files of this model."
        )
    if "low_freq_factor" in adjustments or "high_freq_factor" in adjustments:
        return RopeScaling(
            kind="llama3",
            factor=float(adjustments["factor"]),
            low_freq_factor=float(adjustments["low_freq_factor"]),
            high_freq_factor=float(adjustments["high_freq_factor"]),
            original_max_seq_length=int(adjustments["original_max_seq_len"]),
        )
    if "factor" in adjustments:
        return RopeScaling(kind="linear", factor=float(adjustments["factor"]))
    return None


def _feed_forward(raw: Json, values: Json) -> Json:
    gelu = _one_of(raw, "gelu_approximate", GELU)
    kinds: Json = {
        "GptNeoxMLP": {"mlp": "plain", "activation": gelu},
        "LLaMAMLP": {"mlp": "gated", "activation": "silu"},
        "GemmaMLP": {"mlp": "gated", "activation": gelu},
        "LLaMAMoE": {"mlp": "gated", "activation": "silu"},
    }
    out = dict(_one_of(raw, "mlp_class_name", kinds))
    if raw["mlp_class_name"] != "LLaMAMoE":
        return out
    if values["mlp_bias"]:
        raise UserError("bias is true in a model with experts. Supported: false.")
    experts: Json = {
        "num_experts": raw["n_expert"],
        "num_experts_per_token": raw["n_expert_per_token"],
        "intermediate_size": raw["moe_intermediate_size"] or values["intermediate_size"],
        "num_shared_experts": raw["n_shared_expert"] or 0,
        "num_dense_layers": raw["first_k_dense_replace"] or 0,
        "scale": float(raw["routed_scaling_factor"]),
    }
    if raw["n_expert_groups"]:
        experts |= {
            "score": "sigmoid",
            "normalize": raw["norm_topk_prob"],
            "selection_bias": True,
            "num_groups": raw["n_expert_groups"],
            "num_groups_per_token": raw["n_topk_groups"],
            "group_score": _one_of(raw, "n_topk_scores_per_group", GROUP_SCORE),
        }
    return out | {"moe": MixtureOfExperts(**experts)}


def _one_of(raw: Json, key: str, values: Any) -> Any:
    """Our value for theirs; UserError for one that is not in the table."""
    if raw[key] not in values:
        supported = ", ".join(map(str, values))
        raise UserError(f"{key} is {raw[key]!r}. Supported: {supported}.")
    return values[raw[key]]


def words(config: ModelConfig, *, repository: str | None = None) -> Json:
    """All 51 fields of LitGPT's `model_config.yaml` for a model of ours.

    `repository` is the model's on the hub. Raises UserError naming the switches that LitGPT lacks.
    """
    config = _without_training(config)
    out = {word.theirs: word.write(config) for word in WORDS}
    out |= DEFAULTS | {
        "hf_config": _hf_config(config, repository),
        "name": _name(config),
        "vocab_size": config.token_ids,
        "padded_vocab_size": config.vocab_size,
        "padding_multiple": 1,
        "rope_base": _whole(config.rope_theta),
        "norm_1": config.pre_norm,
        "norm_2": config.pre_norm,
        "post_attention_norm": config.post_norm,
        "post_mlp_norm": config.post_norm,
        "attn_bias": config.qkv_bias and not config.mlp_bias,
        "scale_embeddings": config.embedding_scale != 1.0,
    }
    out |= _attention_words(config) | _rope_words(config) | _feed_forward_words(config)
    try:
        lost = differences(config, parse(out))
    except UserError as error:
        raise UserError(f"LitGPT cannot express the model: {error}") from None
    # Whether embedding and head are one is for the reader of the weights to see.
    lost = [switch for switch in lost if not switch.startswith("tie_embeddings=")]
    if lost:
        raise UserError(
            f"LitGPT cannot express {', '.join(lost)}. Change these values, or export the "
            "Hugging Face way: gristmill export SRC DST --format hf"
        )
    return out


def _without_training(config: ModelConfig) -> ModelConfig:
    """Without what changes training only, which no file of LitGPT has."""
    if config.moe is None:
        return config
    return replace(config, moe=replace(config.moe, balance_loss=0.0))


def _hf_config(config: ModelConfig, repository: str | None) -> Json:
    org, _, name = (repository or "").rpartition("/")
    own = {"name": config.name, "num_token_ids": config.num_token_ids}
    return ({"name": name, "org": org} if repository else {}) | {MARKER: own}


def _name(config: ModelConfig) -> str:
    """The model's name, changed where LitGPT would take a switch from it that it does not have."""
    name = config.name
    for part, on in (
        (UNIT_OFFSET, config.norm == "rmsnorm" and config.norm_unit_offset),
        (WEIGHTLESS, config.norm == "layernorm" and not config.norm_weight),
    ):
        matters = (part == UNIT_OFFSET) == (config.norm == "rmsnorm")
        if on and part not in name:
            name = f"{part}-{name}"
        elif matters and not on:
            name = name.replace(part, part.lower())
    return name


def _attention_words(config: ModelConfig) -> Json:
    out: Json = {"norm_qk": config.qk_norm != "none"}
    if config.qk_norm == "full":
        out["norm_qk_type"] = "olmo2"
    if config.attention_scale is not None:
        out["attention_scores_scalar"] = _whole(config.attention_scale**-2)
    if config.sliding_window is not None:
        out["sliding_window_indices"] = [int(w is not None) for w in config.windows]
    latent = config.latent_attention
    if latent is not None:
        if latent.q_lora_rank is None:
            raise UserError("LitGPT cannot express latent_attention without q_lora_rank.")
        fields = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        out["latent_attention"] = {key: getattr(latent, key) for key in (*fields, "v_head_dim")}
    return out


def _rope_words(config: ModelConfig) -> Json:
    out: Json = {}
    scaling = config.rope_scaling
    if config.rope_local_theta is not None:
        out["rope_local_base_freq"] = _whole(config.rope_local_theta)
        out["rope_indices"] = [int(w is not None) for w in config.windows]
    if scaling is not None and scaling.kind == "linear":
        out["rope_adjustments"] = {"factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        out["rope_adjustments"] = {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_seq_len": scaling.original_max_seq_length,
        }
    return out


def _feed_forward_words(config: ModelConfig) -> Json:
    exact = {ours: theirs for theirs, ours in GELU.items()}
    out: Json = {"gelu_approximate": exact.get(config.activation, "none")}
    if config.mlp == "plain":
        out["mlp_class_name"] = "GptNeoxMLP"
    else:
        out["mlp_class_name"] = "LLaMAMLP" if config.activation == "silu" else "GemmaMLP"
    moe = config.moe
    if moe is None:
        return out
    out |= {
        "mlp_class_name": "LLaMAMoE",
        "n_expert": moe.num_experts,
        "n_expert_per_token": moe.num_experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_expert": moe.num_shared_experts or None,
        "first_k_dense_replace": moe.num_dense_layers or None,
        "routed_scaling_factor": moe.scale,
        "norm_topk_prob": moe.normalize,
    }
    if moe.num_groups > 1:
        scores = {ours: theirs for theirs, ours in GROUP_SCORE.items()}
        out |= {
            "n_expert_groups": moe.num_groups,
            "n_topk_groups": moe.num_groups_per_token,
            "n_topk_scores_per_group": scores[moe.group_score],
        }
    return out


def _whole(value: float) -> float | int:
    """An integer where the value is one, or as near as rounding leaves it."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-9 * abs(value) else value

"""Qwen3 with experts (arXiv:2505.09388): the Qwen3 block with 128 experts, of which a token visits
eight.

`vocab_size` has the rows of the files; the tokenizer's largest id is 151668. `balance_loss` is
`router_aux_loss_coef`; transformers adds that loss in training where `output_router_logits` is set,
which does not change the model and is left at its default.
"""

from __future__ import annotations

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.models.zoo import llama
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.mixtral import required_experts
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight
from gristmill.models.zoo.words import (
    ATTENTION_BIAS,
    STANDARD,
    Json,
    Word,
    read_words,
    replaced,
    require,
    write_words,
)
from gristmill.util.errors import UserError

_THEIRS, _OURS = "model.layers.{i}.mlp.", "layers.{i}.mlp."
WEIGHTS = (
    *llama.WEIGHTS,
    Weight(f"{_THEIRS}gate.weight", (f"{_OURS}router.weight",)),
    *(
        Weight(
            f"{_THEIRS}experts.{{e}}.{name}_proj.weight",
            (f"{_OURS}experts.{name}.weight",),
            "experts",
        )
        for name in ("gate", "up", "down")
    ),
)

FIXED = {"qk_norm": "head"}
WORDS = replaced(
    STANDARD,
    Word("max_position_embeddings", "max_seq_length", 32768),
    Word("num_key_value_heads", "num_kv_heads", 4),
    ATTENTION_BIAS,
)

EXPERTS = (
    Word("num_experts_per_tok", "num_experts_per_token", 8),
    Word("moe_intermediate_size", "intermediate_size", 768),
    Word("norm_topk_prob", "normalize", False),
    Word("router_aux_loss_coef", "balance_loss", 0.001),
)
"""Words of the fields of `MixtureOfExperts`."""


def _parse(raw: Json) -> Json:
    fields = read_words(EXPERTS, raw)
    fields["num_experts"] = _first(raw, "num_experts", "num_local_experts", 128)
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    return {
        "sliding_window": window,
        "moe": MixtureOfExperts(num_dense_layers=_dense_layers(raw), **fields),
    }


def _first(raw: Json, word: str, other: str, default: int) -> int:
    """The value of the first word that is there."""
    return next((raw[key] for key in (word, other) if raw.get(key) is not None), default)


def _dense_layers(raw: Json) -> int:
    """How many leading layers have no experts; UserError where other layers have none."""
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if step != 1:
        raise UserError(
            f"decoder_sparse_step is {step}. Supported: 1, where every layer has experts but for "
            "leading ones in mlp_only_layers."
        )
    if sorted(dense) != list(range(len(dense))):
        raise UserError(
            f"mlp_only_layers is {dense}. Supported: none, or the first ones (0, 1 and so on)."
        )
    if len(dense) >= require(raw, "num_hidden_layers"):
        raise UserError(
            "mlp_only_layers has every layer, so that none has experts. "
            "Use the architecture Qwen3ForCausalLM."
        )
    return len(dense)


def _words(config: ModelConfig) -> Json:
    moe, window = required_experts(config), config.windows[0]
    return {
        "num_experts": moe.num_experts,
        **write_words(EXPERTS, moe),
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.num_dense_layers)),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _experts(width: int) -> dict[str, MixtureOfExperts]:
    moe = MixtureOfExperts(
        num_experts=128, num_experts_per_token=8, intermediate_size=width, balance_loss=0.001
    )
    return {"moe": moe}


QWEN = {
    **FIXED,
    "vocab_size": 151936,
    "max_seq_length": 40960,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
B30 = {**QWEN, **shape(48, 2048, 32, 4, 6144), **_experts(768)}
B235 = {**QWEN, **shape(94, 4096, 64, 4, 12288), **_experts(1536)}
LONG = {"max_seq_length": 262144, "rope_theta": 5e6}
LONG_30 = {"max_seq_length": 262144, "rope_theta": 1e7}
ORG = "Qwen/"

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    weights=WEIGHTS,
    words=WORDS,
    fixed=FIXED,
    parse_more=_parse,
    more_words=_words,
    models=table(
        "qwen3_moe",
        size("Qwen3-30B-A3B", ORG, B30),
        size("Qwen3-30B-A3B-Base", ORG, B30, eos_token_id=151643),
        size("Qwen3-30B-A3B-Thinking-2507", ORG, B30, LONG_30),
        size("Qwen3-30B-A3B-Instruct-2507", ORG, B30, LONG_30),
        size("Qwen3-235B-A22B", ORG, B235),
        size("Qwen3-235B-A22B-Thinking-2507", ORG, B235, LONG),
        size("Qwen3-235B-A22B-Instruct-2507", ORG, B235, LONG),
    ),
)

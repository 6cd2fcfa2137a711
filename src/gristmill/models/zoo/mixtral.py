"""Mixtral (arXiv:2401.04088): the Mistral block with eight experts, of which a token visits two.

`balance_loss` is `router_aux_loss_coef`; transformers adds that loss in training where
`output_router_logits` is set, which does not change the model and is left at its default.
"""

from __future__ import annotations

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.models.zoo import llama
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import Fields, shape, size, table
from gristmill.models.zoo.weights import Weight
from gristmill.models.zoo.words import STANDARD, Json, Word, read_words, replaced, write_words
from gristmill.util.errors import UserError

_THEIRS, _OURS = "model.layers.{i}.block_sparse_moe.", "layers.{i}.mlp."
WEIGHTS = (
    *llama.WEIGHTS,
    Weight(f"{_THEIRS}gate.weight", (f"{_OURS}router.weight",)),
    Weight(f"{_THEIRS}experts.{{e}}.w1.weight", (f"{_OURS}experts.gate.weight",), "experts"),
    Weight(f"{_THEIRS}experts.{{e}}.w3.weight", (f"{_OURS}experts.up.weight",), "experts"),
    Weight(f"{_THEIRS}experts.{{e}}.w2.weight", (f"{_OURS}experts.down.weight",), "experts"),
)

WORDS = replaced(
    STANDARD,
    Word("max_position_embeddings", "max_seq_length", 131072),
    Word("num_key_value_heads", "num_kv_heads", 8),
    Word("rms_norm_eps", "norm_eps", 1e-5),
    Word("sliding_window", "sliding_window", None),
    Word("rope_theta", "rope_theta", 1e6),
)

EXPERTS = (
    Word("num_local_experts", "num_experts", 8),
    Word("num_experts_per_tok", "num_experts_per_token", 2),
    Word("router_aux_loss_coef", "balance_loss", 0.001),
    Word("intermediate_size", "intermediate_size"),
)
"""Words of the fields of `MixtureOfExperts`."""


def required_experts(config: ModelConfig) -> MixtureOfExperts:
    """The experts of a model; UserError where it has none."""
    if config.moe is None:
        raise UserError(
            "The architecture has experts and the model has none. "
            "Set moe, or choose another family."
        )
    return config.moe


def _words(config: ModelConfig) -> Json:
    moe = required_experts(config)
    return {**write_words(EXPERTS, moe), "sliding_window": config.windows[0]}


def _experts(width: int, balance_loss: float) -> Fields:
    return {
        "moe": MixtureOfExperts(num_experts=8, intermediate_size=width, balance_loss=balance_loss)
    }


MIXTRAL = {"norm_eps": 1e-5, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2}
B8X7 = {
    **MIXTRAL,
    **shape(32, 4096, 32, 8, 14336),
    **_experts(14336, 0.02),
    "vocab_size": 32000,
    "max_seq_length": 32768,
}
B8X22 = {
    **MIXTRAL,
    **shape(56, 6144, 48, 8, 16384),
    **_experts(16384, 0.001),
    "vocab_size": 32768,
    "max_seq_length": 65536,
}
ORG = "mistralai/"

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    weights=WEIGHTS,
    words=WORDS,
    constants={"router_jitter_noise": 0.0},
    parse_more=lambda raw: {"moe": MixtureOfExperts(**read_words(EXPERTS, raw))},
    more_words=_words,
    models=table(
        "mixtral",
        size("Mixtral-8x7B-v0.1", ORG, B8X7),
        size("Mixtral-8x7B-Instruct-v0.1", ORG, B8X7),
        size("Mixtral-8x22B-v0.1", ORG, B8X22),
        size("Mixtral-8x22B-Instruct-v0.1", ORG, B8X22),
    ),
)

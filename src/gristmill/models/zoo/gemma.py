"""Gemma (arXiv:2403.08295): embeddings times sqrt(width), norms whose weight is added to one, heads
of 256 whatever the width, a gate with the tanh form of GELU, the embedding as output head.

The embeddings' factor is rounded to the type of the weights (55.5 for 55.43 in bf16), which is how
transformers runs these models and how they were trained.
"""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import Fields, shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ATTENTION_BIAS, STANDARD, Json, Word, replaced, require
from gristmill.util.errors import UserError

# Modules of a block that all three generations have.
BLOCK = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def weights(**more: str) -> tuple[Weight, ...]:
    """The names of the tensors; `more` names further modules of a block."""
    return (
        Weight("model.embed_tokens.weight", ("embed.weight",)),
        *layer_weights("model.layers.{i}.", "layers.{i}.", BLOCK | more),
        *layer_weights("", "", {"model.norm": "norm", "lm_head": "head"}),
    )


WORDS = (
    *replaced(
        STANDARD,
        Word("max_position_embeddings", "max_seq_length", 8192),
        Word("head_dim", "head_dim", 256),
        # The first files said gelu and meant its tanh form.
        Word(
            "hidden_act",
            "activation",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},
        ),
        Word("tie_word_embeddings", "tie_embeddings", True),
    ),
    ATTENTION_BIAS,
)

GEMMA: Fields = {"norm_unit_offset": True}


def implied(raw: Json, width: int | None = None) -> Json:
    """Fields that follow from others; UserError for attention that is not causal."""
    if raw.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is True. Supported: False.")
    hidden = raw.get("hidden_size") or width or require(raw, "hidden_size")
    return {"embedding_scale": hidden**0.5}


def body(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> Fields:
    """What all sizes have, and the numbers of one."""
    return {
        **GEMMA,
        **shape(layers, hidden, heads, kv_heads, inner),
        "embedding_scale": hidden**0.5,
        "head_dim": None if hidden == 256 * heads else 256,
        "vocab_size": 256000,
        "max_seq_length": 8192,
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


B2 = body(18, 2048, 8, 1, 16384)
B7 = body(28, 3072, 16, 16, 24576)

FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    model_type="gemma",
    weights=weights(post_attention_layernorm="mlp_norm"),
    words=WORDS,
    fixed=GEMMA,
    # What transformers 4 reads instead of hidden_act.
    constants={"hidden_activation": "gelu_pytorch_tanh"},
    parse_more=implied,
    models=table(
        "gemma",
        size("Gemma-2b", "google/gemma-2b", B2),
        size("Gemma-2b-it", "google/gemma-2b-it", B2),
        size("Gemma-7b", "google/gemma-7b", B7),
        size("Gemma-7b-it", "google/gemma-7b-it", B7),
        size("CodeGemma-7b-it", "google/codegemma-7b-it", B7),
    ),
)

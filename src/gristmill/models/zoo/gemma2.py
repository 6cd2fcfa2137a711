"""Gemma 2 (arXiv:2408.00118): Gemma with norms before and after attention and feed-forward, soft
caps on scores and logits, a scale of scores of its own, a sliding window in every other block."""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.gemma import GEMMA, body, implied, weights
from gristmill.models.zoo.sizes import Fields, size, table
from gristmill.models.zoo.words import (
    ATTENTION_BIAS,
    STANDARD,
    Json,
    Word,
    layer_types,
    parse_layer_types,
    replaced,
)

WEIGHTS = weights(
    post_attention_layernorm="attn_post_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_post_norm",
)

HEAD_DIM = Word("head_dim", "head_dim", 256)
WORDS = (
    *replaced(
        STANDARD,
        Word("max_position_embeddings", "max_seq_length", 8192),
        HEAD_DIM,
        Word(
            "hidden_activation",
            "activation",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": "gelu_tanh"},
        ),
        Word("tie_word_embeddings", "tie_embeddings", True),
    ),
    ATTENTION_BIAS,
    Word("attn_logit_softcapping", "attention_softcap", 50.0, nullable=True),
    Word("final_logit_softcapping", "logit_softcap", 30.0, nullable=True),
    Word("sliding_window", "sliding_window", 4096, nullable=True),
)

GEMMA2: Fields = {**GEMMA, "post_norm": True}


def attention_words(config: ModelConfig) -> Json:
    """The scale of scores, and which blocks have the sliding window."""
    return {
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "layer_types": layer_types(config),
    }


def parse_attention(raw: Json, pattern: tuple[bool, ...]) -> Json:
    """The other direction; `pattern` is the architecture's own."""
    scalar = raw.get("query_pre_attn_scalar") or 256
    head_dim = raw.get("head_dim") or HEAD_DIM.default
    return {
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
        "sliding_pattern": parse_layer_types(raw, pattern),
    }


PATTERN = (True, False)
SIZE: Fields = {
    **GEMMA2,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "sliding_window": 4096,
    "sliding_pattern": PATTERN,
}
B2 = {**body(26, 2304, 8, 4, 9216), **SIZE}
B9 = {**body(42, 3584, 16, 8, 14336), **SIZE}
B27 = {
    **body(46, 4608, 32, 16, 36864),
    **SIZE,
    "head_dim": 128,
    "attention_scale": 144**-0.5,
}

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    weights=WEIGHTS,
    words=WORDS,
    fixed=GEMMA2,
    parse_more=lambda raw: implied(raw) | parse_attention(raw, PATTERN),
    more_words=attention_words,
    models=table(
        "gemma2",
        size("Gemma-2-2b", "google/gemma-2-2b", B2),
        size("Gemma-2-2b-it", "google/gemma-2-2b-it", B2),
        size("Gemma-2-9b", "google/gemma-2-9b", B9),
        size("Gemma-2-9b-it", "google/gemma-2-9b-it", B9),
        size("Gemma-2-27b", "google/gemma-2-27b", B27),
        size("Gemma-2-27b-it", "google/gemma-2-27b-it", B27),
    ),
)

"""Seed-OSS (https://github.com/ByteDance-Seed/seed-oss): the Llama block with heads wider than the
stream's share, and biases on queries, keys and values.
"""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.llama import WEIGHTS
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import STANDARD, Word, replaced

WORDS = replaced(
    STANDARD,
    Word("max_position_embeddings", "max_seq_length", 524288),
    Word("head_dim", "head_dim", 128),
    Word("attention_bias", "qkv_bias", True),
    Word("attention_out_bias", "attention_out_bias", False),
    Word("mlp_bias", "mlp_bias", False),
)

B36 = {
    **shape(64, 5120, 80, 8, 27648),
    "head_dim": 128,
    "vocab_size": 155136,
    "max_seq_length": 524288,
    "norm_eps": 1e-6,
    "rope_theta": 1e7,
    "qkv_bias": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ORG = "ByteDance-Seed/"

FAMILY = Family(
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    model_type="seed_oss",
    weights=WEIGHTS,
    words=WORDS,
    more_words=lambda config: {
        "pad_token_id": None,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    models=table(
        "seed_oss",
        size("Seed-OSS-36B-Base", ORG, B36),
        size("Seed-OSS-36B-Base-woSyn", ORG, B36),
        size("Seed-OSS-36B-Instruct", ORG, B36),
    ),
)

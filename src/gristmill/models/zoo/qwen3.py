"""Qwen3 without experts (arXiv:2505.09388): Qwen2 with normalised query and key heads of 128 values
instead of biases.

`vocab_size` has the rows of the files; the tokenizer's largest id is 151668.
"""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.llama import WEIGHTS
from gristmill.models.zoo.qwen2 import parse_windows, window_words
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import ATTENTION_BIAS, STANDARD, Word, replaced

FIXED = {"qk_norm": "head"}
WORDS = replaced(
    STANDARD,
    Word("max_position_embeddings", "max_seq_length", 32768),
    Word("head_dim", "head_dim", 128),
    ATTENTION_BIAS,
)

QWEN = {
    **FIXED,
    "vocab_size": 151936,
    "max_seq_length": 32768,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
TIED = {"tie_embeddings": True}
B0_6 = {**QWEN, **TIED, **shape(28, 1024, 16, 8, 3072)}
B1_7 = {**QWEN, **TIED, **shape(28, 2048, 16, 8, 6144), "head_dim": None}
B4 = {**QWEN, **TIED, **shape(36, 2560, 32, 8, 9728)}
B8 = {**QWEN, **shape(36, 4096, 32, 8, 12288), "head_dim": None}
B14 = {**QWEN, **shape(40, 5120, 40, 8, 17408), "head_dim": None}
B32 = {**QWEN, **shape(64, 5120, 64, 8, 25600)}
CHAT = {"max_seq_length": 40960, "eos_token_id": 151645}
LONG_CHAT = {"max_seq_length": 262144, "rope_theta": 5e6, "eos_token_id": 151645}
ORG = "Qwen/"

MODELS = table(
    "qwen3",
    size("Qwen3-0.6B", ORG, B0_6, CHAT),
    size("Qwen3-0.6B-Base", ORG, B0_6),
    size("Qwen3-1.7B", ORG, B1_7, CHAT),
    size("Qwen3-1.7B-Base", ORG, B1_7),
    size("Qwen3-4B", ORG, B4, CHAT),
    size("Qwen3-4B-Base", ORG, B4),
    size("Qwen3-4B-Thinking-2507", ORG, B4, LONG_CHAT),
    size("Qwen3-4B-Instruct-2507", ORG, B4, LONG_CHAT),
    size("Qwen3-8B", ORG, B8, CHAT),
    size("Qwen3-8B-Base", ORG, B8),
    size("Qwen3-14B", ORG, B14, CHAT),
    size("Qwen3-14B-Base", ORG, B14),
    size("Qwen3-32B", ORG, B32, CHAT),
)

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    weights=WEIGHTS,
    words=WORDS,
    fixed=FIXED,
    parse_more=parse_windows,
    more_words=window_words,
    models=MODELS,
)

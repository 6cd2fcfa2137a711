"""Qwen2 and Qwen2.5 (arXiv:2412.15115): the Llama block with a bias on query, key and value, and
small sizes whose head is the embedding.

`vocab_size` has the rows of the files; the tokenizer's largest id is 151664.
"""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.llama import WEIGHTS
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import (
    STANDARD,
    Json,
    Word,
    layer_types,
    parse_layer_types,
    replaced,
    shortest,
)

FIXED = {"qkv_bias": True}
WORDS = replaced(STANDARD, Word("max_position_embeddings", "max_seq_length", 32768))


def parse_windows(raw: Json) -> Json:
    """The sliding window, in blocks from `max_window_layers` on unless `layer_types` says which.

    Only `use_sliding_window` makes it count: the files of models without one name a size too.
    """
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return {"sliding_window": None}
    first = raw.get("max_window_layers", 28)
    above = shortest(tuple(layer >= first for layer in range(raw["num_hidden_layers"])))
    return {
        "sliding_window": raw.get("sliding_window", 4096),
        "sliding_pattern": parse_layer_types(raw, above),
    }


def window_words(config: ModelConfig) -> Json:
    """The other direction: `layer_types`, and for older readers the first block with a window."""
    on = [window is not None for window in config.windows]
    out: Json = {"use_sliding_window": any(on), "layer_types": layer_types(config)}
    out["sliding_window"] = config.sliding_window if any(on) else None
    if any(on) and all(on[on.index(True) :]):
        out["max_window_layers"] = on.index(True)
    return out


QWEN = {
    **FIXED,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
SMALL = {**QWEN, "vocab_size": 151936, "max_seq_length": 32768, "tie_embeddings": True}
LARGE = {**QWEN, "vocab_size": 152064, "max_seq_length": 32768}
B0_5 = {**SMALL, **shape(24, 896, 14, 2, 4864)}
B1_5 = {**SMALL, **shape(28, 1536, 12, 2, 8960)}
B3 = {**SMALL, **shape(36, 2048, 16, 2, 11008)}
B7 = {**LARGE, **shape(28, 3584, 28, 4, 18944)}
B14 = {**LARGE, **shape(48, 5120, 40, 8, 13824), "norm_eps": 1e-5}
B32 = {**LARGE, **shape(64, 5120, 40, 8, 27648), "norm_eps": 1e-5}
B72 = {**LARGE, **shape(80, 8192, 64, 8, 29568), "norm_eps": 1e-5}
LONG = {"max_seq_length": 131072}
CHAT = {"eos_token_id": 151645}
# Qwen2.5-Math (arXiv:2409.12122).
MATH = {"max_seq_length": 4096, "rope_theta": 10000.0}
# Qwen2.5-1M (arXiv:2501.15383).
MILLION = {**CHAT, "max_seq_length": 1010000, "rope_theta": 1e7, "norm_eps": 1e-5}
ORG = "Qwen/"

MODELS = table(
    "qwen2",
    size("Qwen2.5-0.5B", ORG, B0_5),
    size("Qwen2.5-0.5B-Instruct", ORG, B0_5, CHAT),
    size("Qwen2.5-1.5B", ORG, B1_5, LONG),
    size("Qwen2.5-1.5B-Instruct", ORG, B1_5, CHAT),
    size("Qwen2.5-3B", ORG, B3),
    size("Qwen2.5-3B-Instruct", ORG, B3, CHAT),
    size("Qwen2.5-7B", ORG, B7, LONG),
    size("Qwen2.5-7B-Instruct", ORG, B7, CHAT),
    size("Qwen2.5-7B-Instruct-1M", ORG, B7, MILLION),
    size("Qwen2.5-14B", ORG, B14, LONG),
    size("Qwen2.5-14B-Instruct", ORG, B14, CHAT),
    size("Qwen2.5-14B-Instruct-1M", ORG, B14, MILLION),
    size("Qwen2.5-32B", ORG, B32, LONG),
    size("Qwen2.5-32B-Instruct", ORG, B32, CHAT),
    size("Qwen2.5-72B", ORG, B72, LONG),
    size("Qwen2.5-72B-Instruct", ORG, B72, CHAT),
    # Qwen2.5-Coder (arXiv:2409.12186).
    size("Qwen2.5-Coder-0.5B", ORG, B0_5),
    size("Qwen2.5-Coder-0.5B-Instruct", ORG, B0_5, CHAT),
    size("Qwen2.5-Coder-1.5B", ORG, B1_5),
    size("Qwen2.5-Coder-1.5B-Instruct", ORG, B1_5, CHAT),
    size("Qwen2.5-Coder-3B", ORG, B3),
    size("Qwen2.5-Coder-3B-Instruct", ORG, B3, CHAT),
    size("Qwen2.5-Coder-7B", ORG, B7),
    size("Qwen2.5-Coder-7B-Instruct", ORG, B7, CHAT),
    size("Qwen2.5-Coder-14B", ORG, B14),
    size("Qwen2.5-Coder-14B-Instruct", ORG, B14, CHAT),
    size("Qwen2.5-Coder-32B", ORG, B32),
    size("Qwen2.5-Coder-32B-Instruct", ORG, B32, CHAT),
    size("Qwen2.5-Math-1.5B", ORG, B1_5, MATH),
    size("Qwen2.5-Math-1.5B-Instruct", ORG, B1_5, MATH, CHAT),
    size("Qwen2.5-Math-7B", ORG, B7, MATH),
    size("Qwen2.5-Math-7B-Instruct", ORG, B7, MATH, CHAT),
    size("Qwen2.5-Math-72B", ORG, B72, MATH),
    size("Qwen2.5-Math-72B-Instruct", ORG, B72, MATH, CHAT),
    # https://qwenlm.github.io/blog/qwq-32b
    size("QwQ-32B", ORG, B32, CHAT, max_seq_length=40960),
    size("QwQ-32B-Preview", ORG, B32, CHAT),
)

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    weights=WEIGHTS,
    words=WORDS,
    fixed=FIXED,
    parse_more=parse_windows,
    more_words=window_words,
    models=MODELS,
)

"""SmolLM3 (https://huggingface.co/blog/smollm3): the Llama block, of which every fourth does not
rotate (arXiv:2501.18795).
"""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.llama import WEIGHTS
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import (
    ATTENTION_BIAS,
    STANDARD,
    Json,
    Word,
    layer_types,
    parse_layer_types,
    replaced,
    shortest,
)

WORDS = replaced(
    STANDARD,
    Word("max_position_embeddings", "max_seq_length", 32768),
    Word("tie_word_embeddings", "tie_embeddings", True),
    ATTENTION_BIAS,
    Word("mlp_bias", "mlp_bias", False),
    Word("rope_theta", "rope_theta", 2e6),
)


def parse_blocks(raw: Json) -> Json:
    """Which blocks rotate, and which have the sliding window: those that do not, unless named."""
    count = raw["num_hidden_layers"]
    every = raw.get("no_rope_layer_interval", 4)
    flags = raw.get("no_rope_layers") or [(layer + 1) % every for layer in range(count)]
    rotates = tuple(bool(flag) for flag in flags[:count])
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    without_rope = tuple(not flag for flag in rotates)
    return {
        "rope_pattern": shortest(rotates),
        "sliding_window": window,
        "sliding_pattern": parse_layer_types(raw, shortest(without_rope)) if window else (True,),
    }


def block_words(config: ModelConfig) -> Json:
    """The other direction; `no_rope_layers` has a one for each block that rotates.

    A `pad_token_id` is written because that of the architecture is beyond a smaller vocabulary.
    """
    windowed = any(config.windows)
    return {
        "pad_token_id": None,
        "no_rope_layers": [int(rotates) for rotates in config.rotates],
        "layer_types": layer_types(config),
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window if windowed else None,
    }


B3 = {
    **shape(36, 2048, 16, 4, 11008),
    "vocab_size": 128256,
    "max_seq_length": 65536,
    "norm_eps": 1e-6,
    "rope_theta": 5e6,
    "rope_pattern": (True, True, True, False),
    "tie_embeddings": True,
    "bos_token_id": 128000,
}
ORG = "HuggingFaceTB/"

MODELS = table(
    "smollm3",
    size("SmolLM3-3B-Base", ORG, B3, eos_token_id=128001),
    size("SmolLM3-3B", ORG, B3, eos_token_id=128012),
)

FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    weights=WEIGHTS,
    words=WORDS,
    parse_more=parse_blocks,
    more_words=block_words,
    models=MODELS,
)

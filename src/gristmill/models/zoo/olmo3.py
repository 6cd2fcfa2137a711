"""OLMo 3 (arXiv:2512.13961): OLMo 2 with a sliding window in three blocks of four, and rotary
frequencies that are stretched (YaRN) in the blocks that see everything only."""

from __future__ import annotations

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models.zoo.family import Family, Json
from gristmill.models.zoo.olmo2 import OLMO2, WEIGHTS
from gristmill.models.zoo.olmo2 import WORDS as OLMO2_WORDS
from gristmill.models.zoo.rope_words import parse_rope, rope_words
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import Word, layer_types, parse_layer_types

WORDS = (*OLMO2_WORDS, Word("sliding_window", "sliding_window", 4096, nullable=True))
THETA = 500000.0
PATTERN = (True, True, True, False)


def _parse(raw: Json) -> Json:
    """Which blocks slide, and their rotary base, which is never scaled.

    transformers 5 writes `rope_parameters` for each kind of block, older ones a base for both and a
    `rope_scaling` for those that see everything.
    """
    fields = {"rope_theta": THETA, **parse_rope(raw)}
    if fields["rope_scaling"] is not None and not raw.get("rope_parameters"):
        fields["rope_local_theta"] = fields["rope_theta"]
    return fields | {"sliding_pattern": parse_layer_types(raw, PATTERN)}


def _words(config: ModelConfig) -> Json:
    scaling = rope_words(config)["rope_scaling"] or {"rope_type": "default"}
    full = {**scaling, "rope_theta": config.rope_theta}
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    return {
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": full if config.rope_local_theta is None else local,
        },
        "layer_types": layer_types(config),
    }


YARN = RopeScaling(
    kind="yarn",
    factor=8.0,
    original_max_seq_length=8192,
)
SIZE = {
    **OLMO2,
    "vocab_size": 100278,
    "max_seq_length": 65536,
    "norm_eps": 1e-6,
    "rope_theta": THETA,
    "rope_local_theta": THETA,
    "rope_scaling": YARN,
    "sliding_window": 4096,
    "sliding_pattern": PATTERN,
    "eos_token_id": 100257,
}
B7 = {**SIZE, **shape(32, 4096, 32, 32, 11008)}
B32 = {**SIZE, **shape(64, 5120, 40, 8, 27648)}

FAMILY = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    weights=WEIGHTS,
    words=WORDS,
    rotary=("rope_local_theta",),
    fixed=OLMO2,
    parse_more=_parse,
    more_words=_words,
    models=table(
        "olmo3",
        size("Olmo-3-1025-7B", "allenai/", B7),
        size("Olmo-3-7B-Instruct", "allenai/", B7),
        size("Olmo-3-7B-Think", "allenai/", B7),
        size("Olmo-3-1125-32B", "allenai/", B32),
        size("Olmo-3-32B-Think", "allenai/", B32),
    ),
)

"""Mistral (arXiv:2310.06825): the Llama block with grouped queries and, in the first version, a
sliding window in every block.
"""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import Adaption, Family
from gristmill.models.zoo.llama import WEIGHTS
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import STANDARD, Json, Word, parse_layer_types, replaced
from gristmill.util.errors import UserError

WORDS = replaced(STANDARD, Word("max_position_embeddings", "max_seq_length", 131072))


def parse_window(raw: Json) -> Json:
    """The sliding window of all blocks: 4096 where the key is missing, none where it is null."""
    window = raw.get("sliding_window", 4096)
    pattern = parse_layer_types(raw, (True,))
    if len(pattern) > 1:
        raise UserError(
            "layer_types has both full_attention and sliding_attention. "
            "Supported in this architecture: one of them for all layers."
        )
    return {"sliding_window": window if pattern == (True,) else None}


def window_word(config: ModelConfig) -> Json:
    """`sliding_window`, null if there is none."""
    return {"sliding_window": config.windows[0]}


V1 = {
    **shape(32, 4096, 32, 8, 14336),
    "vocab_size": 32000,
    "max_seq_length": 32768,
    "norm_eps": 1e-5,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
V2 = {**V1, "rope_theta": 1e6, "sliding_window": None}
V3 = {**V2, "vocab_size": 32768}
LARGE = {**V3, **shape(88, 12288, 96, 8, 28672), "max_seq_length": 131072}
# Heads narrower than width / heads, https://mistral.ai/news/mistral-nemo
NEMO = {
    **V3,
    **shape(40, 5120, 32, 8, 14336),
    "head_dim": 128,
    "vocab_size": 131072,
    "max_seq_length": 131072,
}
# H2O-Danube2, https://huggingface.co/h2oai/h2o-danube2-1.8b-chat
DANUBE = {
    **V1,
    **shape(24, 2560, 32, 8, 6912),
    "max_seq_length": 8192,
    "sliding_window": None,
}
ORG = "mistralai/"

MODELS = table(
    "mistral",
    size("Mistral-7B-v0.1", ORG, V1),
    size("Mistral-7B-Instruct-v0.1", ORG, V1),
    size("Mistral-7B-v0.2", "unsloth/", V2),
    size("Mistral-7B-Instruct-v0.2", ORG, V2),
    size("Mistral-7B-v0.3", ORG, V3),
    size("Mistral-7B-Instruct-v0.3", ORG, V3),
    size("Mathstral-7B-v0.1", "mistralai/mathstral-7B-v0.1", V3, sliding_window=4096),
    size("Mistral-Nemo-Base-2407", ORG, NEMO, max_seq_length=128000),
    size("Mistral-Nemo-Instruct-2407", ORG, NEMO),
    size("Mistral-Large-Instruct-2407", ORG, LARGE),
    size("Mistral-Large-Instruct-2411", ORG, LARGE),
    size("Danube2-1.8b-chat", "h2oai/h2o-danube2-1.8b-chat", DANUBE),
)

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    weights=WEIGHTS,
    adaption=Adaption("model.layers.{i}.self_attn"),
    words=WORDS,
    parse_more=parse_window,
    more_words=window_word,
    models=MODELS,
)

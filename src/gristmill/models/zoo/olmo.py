"""OLMo (arXiv:2402.00838): a Llama block whose LayerNorm has neither weight nor bias."""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.llama import WEIGHTS
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.words import ATTENTION_BIAS, STANDARD, Word, without

WORDS = (
    *without(STANDARD, "norm_eps"),
    ATTENTION_BIAS,
    Word("clip_qkv", "qkv_clip", None),
)

OLMO = {"norm": "layernorm", "norm_weight": False, "norm_eps": 1e-5}
SIZE = {**OLMO, "vocab_size": 50304, "max_seq_length": 2048, "eos_token_id": 50279}
B1 = {**SIZE, **shape(16, 2048, 16, 16, 8192), "tie_embeddings": True}
B7 = {**SIZE, **shape(32, 4096, 32, 32, 11008)}

FAMILY = Family(
    name="olmo",
    architecture="OlmoForCausalLM",
    model_type="olmo",
    weights=WEIGHTS,
    words=WORDS,
    fixed=OLMO,
    models=table(
        "olmo",
        size("OLMo-1B-hf", "allenai/", B1),
        size("OLMo-7B-hf", "allenai/", B7),
        size("OLMo-7B-Instruct-hf", "allenai/", B7),
    ),
)

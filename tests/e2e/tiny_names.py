"""The models that tutorials name, with few parameters and their own architecture."""

from __future__ import annotations

from dataclasses import replace

from gristmill.models import zoo
from gristmill.models.zoo.sizes import Model

VOCABULARY = 384
NAMES = (
    "pythia-14m",
    "pythia-160m",
    "tiny-llama-1.1b",
    "phi-2",
    "Llama-2-7b-hf",
    "Llama-3-8B",
    "llama-7b",
)
"""Models that the tutorials name: their architecture, three layers of 40."""


def tiny_models() -> dict[str, Model]:
    """All named models, those of the tutorials with few parameters."""
    found = dict(zoo.models())
    for name in NAMES:
        config = found[name].config
        shape = replace(
            config,
            num_layers=3,
            hidden_size=40,
            num_heads=4,
            num_kv_heads=None if config.num_kv_heads is None else 2,
            intermediate_size=64,
            vocab_size=VOCABULARY,
            num_token_ids=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        found[name] = Model(found[name].repo, shape)
    return found

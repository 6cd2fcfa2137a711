"""No word of a `config.json` is passed over unseen: each is read, or known to change nothing."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from families import CASES, TINY

from gristmill.models import zoo

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

HARMLESS = {
    # What every configuration has: labels, how to run, where it comes from.
    *transformers.PretrainedConfig().to_dict(),
    "use_cache",
    "pad_token_id",
    # Training: we train without dropout, and with initial values and a balance loss of our own.
    "initializer_range",
    *("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),
    "output_router_logits",
    # Other heads than that of a language model.
    *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
    "summary_proj_to_labels",
    # How sums are rounded.
    *("pretraining_tp", "reorder_and_upcast_attn"),
    # Said a second time by other words.
    "_sliding_window_pattern",
    "qk_head_dim",
    # A warning of theirs hangs on it; further blocks that their classes leave out.
    *("is_decoder", "num_nextn_predict_layers"),
} - {"tie_word_embeddings", "add_cross_attention"}
WIDTH_OF_ROTATION = {"head_dim"}  # with latent attention; it is qk_rope_head_dim
ALSO_HARMLESS = {"DeepseekV2": WIDTH_OF_ROTATION, "DeepseekV3": WIDTH_OF_ROTATION}


class Spy(dict[str, Any]):
    """A `config.json` that knows which of its words were asked for."""

    def __init__(self, raw: dict[str, Any], asked: set[str]) -> None:
        super().__init__(raw)
        self.asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        """Their value."""
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def test_every_word_that_transformers_writes_is_read_or_harmless():
    asked: dict[str, set[str]] = defaultdict(set)
    said: dict[str, set[str]] = defaultdict(set)
    for kind, options in CASES.values():
        config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
        raw = config.to_dict()
        said[kind] |= set(raw) & set(type(config)().to_dict())
        family = zoo.family_of(raw)
        family.from_hf_config(Spy(raw, asked[kind]))
    ignored = {
        kind: sorted(said[kind] - asked[kind] - HARMLESS - ALSO_HARMLESS.get(kind, set()))
        for kind in said
    }
    assert {kind: words for kind, words in ignored.items() if words} == {}
    assert len(said) == len(zoo.FAMILIES)

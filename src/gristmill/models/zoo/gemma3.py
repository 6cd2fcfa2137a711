"""Gemma 3 (arXiv:2503.19786), its text model: Gemma 2 without soft caps, with normalised queries
and keys, a sliding window and a rotary base of its own in five of six blocks.

The larger repositories hold a model of text and images. Their text weights and `text_config` are
read; what is written is the text model alone.
"""

from __future__ import annotations

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.gemma import body, implied, weights
from gristmill.models.zoo.gemma2 import GEMMA2, HEAD_DIM, attention_words, parse_attention
from gristmill.models.zoo.rope_words import parse_rope
from gristmill.models.zoo.sizes import Fields, size, table
from gristmill.models.zoo.words import ATTENTION_BIAS, Json, Word

WEIGHTS = weights(
    **{"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"},
    post_attention_layernorm="attn_post_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_post_norm",
)

# All of them may be missing: `text_config` holds what differs from these.
WIDTH, THETA, LOCAL_THETA = 2304, 1_000_000.0, 10_000.0
WORDS = (
    Word("vocab_size", "vocab_size", 262208),
    Word("max_position_embeddings", "max_seq_length", 131072),
    Word("hidden_size", "hidden_size", WIDTH),
    Word("num_hidden_layers", "num_layers", 26),
    Word("num_attention_heads", "num_heads", 8),
    Word("num_key_value_heads", "num_kv_heads", 4),
    HEAD_DIM,
    Word("intermediate_size", "intermediate_size", 9216),
    Word(
        "hidden_activation", "activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh"}
    ),
    Word("rms_norm_eps", "norm_eps", 1e-6),
    Word("final_logit_softcapping", "logit_softcap", None),
    Word("sliding_window", "sliding_window", 4096, nullable=True),
    Word("tie_word_embeddings", "tie_embeddings", True),
    ATTENTION_BIAS,
)

GEMMA3: Fields = {**GEMMA2, "qk_norm": "head"}


def _parse_more(raw: Json) -> Json:
    period = raw.get("sliding_window_pattern") or 6
    pattern = (True,) * (period - 1) + (False,)
    return implied(raw, WIDTH) | parse_attention(raw, pattern) | _parse_two_bases(raw)


def _parse_two_bases(raw: Json) -> Json:
    rope = parse_rope(raw)
    theta = rope.get("rope_theta", THETA)
    # Of two equal sets of `rope_parameters` the local one is not told.
    by_type = "full_attention" in (raw.get("rope_parameters") or {})
    local = rope.get("rope_local_theta", theta if by_type else LOCAL_THETA)
    same = local == theta and (by_type or rope["rope_scaling"] is None)
    return {"rope_theta": theta, "rope_local_theta": None if same else local}


def _more_words(config: ModelConfig) -> Json:
    local = config.rope_local_theta or config.rope_theta
    return attention_words(config) | {"rope_local_base_freq": local}


def _text_config(raw: Json) -> Json:
    """The text model of a model of text and images."""
    if "text_config" not in raw:
        return raw
    text: Json = raw["text_config"]
    tied = raw.get("tie_word_embeddings")
    return text if tied is None else text | {"tie_word_embeddings": tied}


SIZE: Fields = {
    **GEMMA3,
    "vocab_size": 262208,
    "max_seq_length": 131072,
    "sliding_window": 1024,
    "sliding_pattern": (True,) * 5 + (False,),
    "rope_theta": THETA,
    "rope_local_theta": LOCAL_THETA,
    "rope_scaling": RopeScaling(kind="linear", factor=8.0),
}
SMALL = {"vocab_size": 262144, "max_seq_length": 32768, "sliding_window": 512, "rope_scaling": None}
LARGE = {"head_dim": 128, "attention_scale": 168**-0.5}

FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    weights=WEIGHTS,
    words=WORDS,
    rotary=("rope_local_theta",),
    fixed=GEMMA3,
    # transformers has the word and does nothing with it.
    constants={"attn_logit_softcapping": None},
    parse_more=_parse_more,
    more_words=_more_words,
    models=table(
        "gemma3",
        size("Gemma-3-1b-it", "google/gemma-3-1b-it", body(26, 1152, 4, 1, 6912), SIZE, SMALL),
        size("Gemma-3-4b-it", "google/gemma-3-4b-it", body(34, 2560, 8, 4, 10240), SIZE),
        size("Gemma-3-12b-it", "google/gemma-3-12b-it", body(48, 3840, 16, 8, 15360), SIZE),
        size("Gemma-3-27b-it", "google/gemma-3-27b-it", body(62, 5376, 32, 16, 21504), SIZE, LARGE),
    ),
    also_reads=("Gemma3ForConditionalGeneration",),
    unwrap=_text_config,
    renames=((r"^language_model\.", ""), (r"^model\.language_model\.", "model.")),
    dropped=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
)

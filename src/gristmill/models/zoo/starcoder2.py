"""StarCoder2 (arXiv:2402.19173): LayerNorm, plain GELU feed-forward, biases, few key-value heads,
a sliding window in every block. docs/adding-a-family.md goes through this file."""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ACTIVATIONS, STANDARD, Word, replaced

WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed.weight",)),
    *layer_weights(
        "model.layers.{i}.",
        "layers.{i}.",
        {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        },
    ),
    *layer_weights("", "", {"model.norm": "norm", "lm_head": "head"}),
)

WORDS = (
    *replaced(
        STANDARD,
        Word("max_position_embeddings", "max_seq_length", 4096),
        Word("norm_epsilon", "norm_eps", 1e-5),
        Word("hidden_act", "activation", "gelu_pytorch_tanh", ACTIVATIONS),
        Word("tie_word_embeddings", "tie_embeddings", True),
    ),
    Word("use_bias", ("qkv_bias", "attention_out_bias", "mlp_bias"), True),
    Word("sliding_window", "sliding_window", None),
)

FIXED = {"norm": "layernorm", "mlp": "plain"}
SIZE = {
    **FIXED,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "sliding_window": 4096,
    "vocab_size": 49152,
    "max_seq_length": 16384,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TIED = {**SIZE, "tie_embeddings": True}

FAMILY = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    weights=WEIGHTS,
    words=WORDS,
    fixed=FIXED,
    models=table(
        "starcoder2",
        size(
            "starcoder2-3b",
            "bigcode/",
            TIED,
            shape(30, 3072, 24, 2, 12288),
            rope_theta=999999.4420358813,
        ),
        size(
            "starcoder2-7b",
            "bigcode/",
            TIED,
            shape(32, 4608, 36, 4, 18432),
            rope_theta=1e6,
        ),
        size(
            "starcoder2-15b",
            "bigcode/",
            SIZE,
            shape(40, 6144, 48, 4, 24576),
            rope_theta=1e5,
        ),
    ),
)

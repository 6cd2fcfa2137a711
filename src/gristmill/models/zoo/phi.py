"""Phi 1.5 and 2 (arXiv:2309.05463): attention and feed-forward side by side behind one LayerNorm,
biases everywhere, on the output head too, rotary over part of each head."""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import Fields, shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import STANDARD, Word, replaced, without

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
            "self_attn.dense": "attn.o",
            "mlp.fc1": "mlp.up",
            "mlp.fc2": "mlp.down",
        },
    ),
    *layer_weights("", "", {"model.final_layernorm": "norm", "lm_head": "head"}),
)

WORDS = (
    *replaced(
        without(STANDARD, "head_dim", "tie_embeddings"),
        Word("layer_norm_eps", "norm_eps", 1e-5),
        Word(
            "hidden_act",
            "activation",
            "gelu_new",
            {
                "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_fast": "gelu_tanh",
                "gelu": "gelu",
                "silu": "silu",
            },
        ),
    ),
    Word("partial_rotary_factor", "rope_fraction", 0.5),
)

PHI: Fields = {
    "norm": "layernorm",
    "parallel_residual": True,
    "shared_norm": True,
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp": "plain",
    "mlp_bias": True,
    "head_bias": True,
}
SIZE: Fields = {**PHI, "activation": "gelu_tanh", "vocab_size": 51200, "max_seq_length": 2048}

FAMILY = Family(
    name="phi",
    architecture="PhiForCausalLM",
    model_type="phi",
    weights=WEIGHTS,
    words=WORDS,
    rotary=("rope_fraction",),
    fixed=PHI,
    constants={"qk_layernorm": False, "tie_word_embeddings": False},
    models=table(
        "phi",
        size("phi-1_5", "microsoft/", SIZE, shape(24, 2048, 32, 32, 8192), rope_fraction=0.5),
        size(
            "phi-2",
            "microsoft/",
            SIZE,
            shape(32, 2560, 32, 32, 10240),
            rope_fraction=0.4,
            bos_token_id=50256,
            eos_token_id=50256,
        ),
    ),
)

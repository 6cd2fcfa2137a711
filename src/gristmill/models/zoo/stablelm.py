"""StableLM after its first generation: a Llama block with LayerNorm and rotary over a quarter of
each head (https://huggingface.co/stabilityai/stablelm-3b-4e1t)."""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.llama import WEIGHTS as LLAMA_WEIGHTS
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight
from gristmill.models.zoo.words import ACTIVATIONS, STANDARD, Word, replaced, without

WEIGHTS = (*LLAMA_WEIGHTS, Weight("model.norm.bias", ("norm.bias",)))

WORDS = (
    *replaced(
        without(STANDARD, "head_dim"),
        Word("max_position_embeddings", "max_seq_length", 4096),
        Word("layer_norm_eps", "norm_eps", 1e-5),
        Word("hidden_act", "activation", "silu", ACTIVATIONS),
    ),
    Word("use_qkv_bias", "qkv_bias", False),
    # Where attention and feed-forward run side by side they share one normalisation.
    Word("use_parallel_residual", ("parallel_residual", "shared_norm"), False),
    Word("partial_rotary_factor", "rope_fraction", 0.25),
)

FIXED = {"norm": "layernorm"}
B3 = {
    **FIXED,
    **shape(32, 2560, 32, 32, 6912),
    "rope_fraction": 0.25,
    "vocab_size": 50304,
    "max_seq_length": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAMILY = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    weights=WEIGHTS,
    words=WORDS,
    rotary=("rope_fraction",),
    fixed=FIXED,
    # A LayerNorm of its own for each query and key head (StableLM 2 12B).
    constants={"qk_layernorm": False},
    models=table(
        "stablelm",
        size("stablelm-3b-4e1t", "stabilityai/", B3),
        size("stablelm-zephyr-3b", "stabilityai/", B3),
        size(
            "stable-code-3b",
            "stabilityai/",
            B3,  # arXiv:2404.01226
            max_seq_length=16384,
            rope_theta=1e6,
        ),
    ),
)

"""GPT-NeoX (arXiv:2204.06745): LayerNorm, GELU, parallel residual, biases, rotary over a quarter of
each head, query, key and value in one matrix on disk. Pythia (arXiv:2304.01373) and the first
StableLM and StableCode models are of this kind.

`vocab_size` has the rows of the files. Pythia's tokenizer ends at id 50276, the rest is padding.
"""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ACTIVATIONS, STANDARD, Word, replaced, without

_LAYER = "gpt_neox.layers.{i}."
WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", ("embed.weight",)),
    Weight(
        _LAYER + "attention.query_key_value.weight",
        ("layers.{i}.attn.q.weight", "layers.{i}.attn.k.weight", "layers.{i}.attn.v.weight"),
        "groups",
    ),
    Weight(
        _LAYER + "attention.query_key_value.bias",
        ("layers.{i}.attn.q.bias", "layers.{i}.attn.k.bias", "layers.{i}.attn.v.bias"),
        "groups",
    ),
    *layer_weights(
        _LAYER,
        "layers.{i}.",
        {
            "input_layernorm": "attn_norm",
            "attention.dense": "attn.o",
            "post_attention_layernorm": "mlp_norm",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        },
    ),
    *layer_weights("gpt_neox.", "", {"final_layer_norm": "norm"}),
    Weight("embed_out.weight", ("head.weight",)),
)

WORDS = (
    *replaced(
        without(STANDARD, "num_kv_heads", "head_dim"),
        Word("layer_norm_eps", "norm_eps", 1e-5),
        Word("hidden_act", "activation", "gelu", ACTIVATIONS),
    ),
    Word("attention_bias", ("qkv_bias", "attention_out_bias"), True),
    Word("use_parallel_residual", "parallel_residual", True),
    Word("rotary_pct", "rope_fraction", 0.25),
)

# What GPT-NeoX means whatever its config.json says.
NEOX = {"norm": "layernorm", "mlp": "plain", "mlp_bias": True}
BLOCK = {
    **NEOX,
    "activation": "gelu",
    "qkv_bias": True,
    "attention_out_bias": True,
    "parallel_residual": True,
    "rope_fraction": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _block(layers: int, hidden: int, heads: int, context: int, rows: int) -> dict[str, object]:
    return {
        **BLOCK,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_seq_length": context,
        "vocab_size": rows,
    }


P14M = _block(6, 128, 4, 512, 50304)
P31M = _block(6, 256, 8, 1024, 50304)
P70M = _block(6, 512, 8, 2048, 50304)
P160M = _block(12, 768, 12, 2048, 50304)
P410M = _block(24, 1024, 16, 2048, 50304)
P1B = _block(16, 2048, 8, 2048, 50304)
P1_4B = _block(24, 2048, 16, 2048, 50304)
P2_8B = _block(32, 2560, 32, 2048, 50304)
P6_9B = _block(32, 4096, 32, 2048, 50432)
P12B = _block(36, 5120, 40, 2048, 50688)
STABLE_3B = _block(16, 4096, 32, 4096, 50688)
STABLE_7B = _block(16, 6144, 48, 4096, 50432)
CODE_3B = _block(32, 2560, 32, 4096, 49152)

MODELS = table(
    "pythia",
    size("pythia-14m", "EleutherAI/", P14M),
    size("pythia-31m", "EleutherAI/", P31M),
    size("pythia-70m", "EleutherAI/", P70M),
    size("pythia-70m-deduped", "EleutherAI/", P70M),
    size("pythia-160m", "EleutherAI/", P160M),
    size("pythia-160m-deduped", "EleutherAI/", P160M),
    size("pythia-410m", "EleutherAI/", P410M),
    size("pythia-410m-deduped", "EleutherAI/", P410M),
    size("pythia-1b", "EleutherAI/", P1B),
    size("pythia-1b-deduped", "EleutherAI/", P1B),
    size("pythia-1.4b", "EleutherAI/", P1_4B),
    size("pythia-1.4b-deduped", "EleutherAI/", P1_4B),
    size("pythia-2.8b", "EleutherAI/", P2_8B),
    size("pythia-2.8b-deduped", "EleutherAI/", P2_8B),
    size("pythia-6.9b", "EleutherAI/", P6_9B),
    size("pythia-6.9b-deduped", "EleutherAI/", P6_9B),
    size("pythia-12b", "EleutherAI/", P12B),
    size("pythia-12b-deduped", "EleutherAI/", P12B),
    size("stablelm-base-alpha-3b", "stabilityai/", STABLE_3B),
    size("stablelm-base-alpha-7b", "stabilityai/", STABLE_7B),
    size("stablelm-tuned-alpha-3b", "stabilityai/", STABLE_3B),
    size("stablelm-tuned-alpha-7b", "stabilityai/", STABLE_7B),
    size(
        "stablecode-completion-alpha-3b",
        "stabilityai/",
        CODE_3B,
        max_seq_length=16384,
    ),
    size(
        "stablecode-completion-alpha-3b-4k",
        "stabilityai/",
        CODE_3B,
    ),
    size("stablecode-instruct-alpha-3b", "stabilityai/", CODE_3B),
)

FAMILY = Family(
    name="pythia",
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    weights=WEIGHTS,
    modules={"embed_out": "lm_head"},
    words=WORDS,
    rotary=("rope_fraction",),
    theta_key="rotary_emb_base",
    fixed=NEOX,
    models=MODELS,
    # Tables of who may look at whom.
    dropped=(r"\.attention\.(masked_)?bias$",),
)

"""GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019): learned positions,
LayerNorm, GELU by tanh, biases, a tied head; matrices lie transposed on disk (`Conv1D`)."""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import Adaption, Family, Json
from gristmill.models.zoo.sizes import size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ACTIVATIONS, Word

_LAYER = "transformer.h.{i}."
WEIGHTS = (
    Weight("transformer.wte.weight", ("embed.weight",)),
    Weight("transformer.wpe.weight", ("positions.weight",)),
    Weight(
        _LAYER + "attn.c_attn.weight",
        ("layers.{i}.attn.q.weight", "layers.{i}.attn.k.weight", "layers.{i}.attn.v.weight"),
        "blocks_transposed",
    ),
    Weight(
        _LAYER + "attn.c_attn.bias",
        ("layers.{i}.attn.q.bias", "layers.{i}.attn.k.bias", "layers.{i}.attn.v.bias"),
        "blocks",
    ),
    *layer_weights(
        _LAYER,
        "layers.{i}.",
        {
            "ln_1": "attn_norm",
            "attn.c_proj": "attn.o",
            "ln_2": "mlp_norm",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        },
        o="transposed",
        up="transposed",
        down="transposed",
    ),
    *layer_weights("transformer.", "", {"ln_f": "norm"}),
    Weight("lm_head.weight", ("head.weight",)),
)

WORDS = (
    Word("vocab_size", "vocab_size"),
    Word("n_positions", "max_seq_length", 1024),
    Word("n_embd", "hidden_size"),
    Word("n_layer", "num_layers"),
    Word("n_head", "num_heads"),
    Word("layer_norm_epsilon", "norm_eps", 1e-5),
    Word("activation_function", "activation", "gelu_new", {"gelu_new": "gelu_tanh", **ACTIVATIONS}),
    Word("tie_word_embeddings", "tie_embeddings", True),
)

GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "plain",
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
}


def _parse(raw: Json) -> Json:
    return {"intermediate_size": raw.get("n_inner") or 4 * raw["n_embd"]}


def _words(config: ModelConfig) -> Json:
    return {
        "n_inner": config.intermediate_size,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _block(layers: int, hidden: int, heads: int) -> dict[str, object]:
    return {
        **GPT2,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "intermediate_size": 4 * hidden,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "vocab_size": 50257,
        "max_seq_length": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    weights=WEIGHTS,
    adaption=Adaption("transformer.h.{i}.attn", projected=False),
    words=WORDS,
    fixed=GPT2,
    constants={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    parse_more=_parse,
    more_words=_words,
    models=table(
        "gpt2",
        size("gpt2", "openai-community/", _block(12, 768, 12)),
        size("gpt2-medium", "openai-community/", _block(24, 1024, 16)),
        size("gpt2-large", "openai-community/", _block(36, 1280, 20)),
        size("gpt2-xl", "openai-community/", _block(48, 1600, 25)),
    ),
    # Tables of who may look at whom.
    dropped=(r"\.attn\.(masked_)?bias$",),
    # The first files have names without the prefix.
    renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
)

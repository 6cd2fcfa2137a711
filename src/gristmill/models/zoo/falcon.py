"""Falcon (arXiv:2311.16867): LayerNorm, exact GELU, parallel residual, few keys and values.

There are two generations. The first (7B) has one key-value head and one normalisation for both
branches; the second, `new_decoder_architecture` (40B, 180B), groups of heads and two of them.
"""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import Family, Json
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ACTIVATIONS, Word
from gristmill.util.errors import UserError

_LAYER = "transformer.h.{i}."
WEIGHTS = (
    Weight("transformer.word_embeddings.weight", ("embed.weight",)),
    Weight(
        _LAYER + "self_attention.query_key_value.weight",
        ("layers.{i}.attn.q.weight", "layers.{i}.attn.k.weight", "layers.{i}.attn.v.weight"),
        "groups",
    ),
    Weight(
        _LAYER + "self_attention.query_key_value.bias",
        ("layers.{i}.attn.q.bias", "layers.{i}.attn.k.bias", "layers.{i}.attn.v.bias"),
        "groups",
    ),
    *layer_weights(
        _LAYER,
        "layers.{i}.",
        {
            "self_attention.dense": "attn.o",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        },
    ),
    *layer_weights("transformer.", "", {"ln_f": "norm"}),
    Weight("lm_head.weight", ("head.weight",)),
)
# The normalisations of a block have names that depend on how many there are.
COMMON_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
TWO_NORMS = {"ln_attn": "attn_norm", "ln_mlp": "mlp_norm"}

WORDS = (
    Word("vocab_size", "vocab_size"),
    Word("max_position_embeddings", "max_seq_length", 2048),
    Word("hidden_size", "hidden_size"),
    Word("num_hidden_layers", "num_layers"),
    Word("num_attention_heads", "num_heads"),
    Word("layer_norm_epsilon", "norm_eps", 1e-5),
    Word("activation", "activation", "gelu", ACTIVATIONS),
    Word("bias", ("qkv_bias", "attention_out_bias", "mlp_bias"), False),
    Word("tie_word_embeddings", "tie_embeddings", True),
)


def _weights(config: ModelConfig) -> tuple[Weight, ...]:
    two = config.parallel_residual and not config.shared_norm
    return (*WEIGHTS, *layer_weights(_LAYER, "layers.{i}.", TWO_NORMS if two else COMMON_NORMS))


def _parse(raw: Json) -> Json:
    """Key-value heads, normalisations and the feed-forward's width."""
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_kv_heads")
    norms = raw.get("num_ln_in_parallel_attn")
    fields: Json = {"intermediate_size": raw.get("ffn_hidden_size") or 4 * raw["hidden_size"]}
    if raw.get("new_decoder_architecture"):
        if norms not in (None, 1, 2):
            raise UserError(f"num_ln_in_parallel_attn is {norms}. Supported: 1, 2.")
        shared = norms == 1
        return fields | {
            "num_kv_heads": kv_heads or heads,
            "parallel_residual": True,
            "shared_norm": shared,
        }
    if norms == 2:
        raise UserError("num_ln_in_parallel_attn is 2. Supported: 1, or new_decoder_architecture.")
    one = raw.get("multi_query", True)
    if not one and kv_heads not in (None, heads):
        raise UserError(
            f"num_kv_heads is {kv_heads} of {heads}, multi_query is false. "
            "Supported: all of them, or new_decoder_architecture."
        )
    parallel = bool(raw.get("parallel_attn", True))
    return fields | {
        "num_kv_heads": 1 if one else heads,
        "parallel_residual": parallel,
        "shared_norm": parallel,
    }


def _words(config: ModelConfig) -> Json:
    """The first generation's words where they will do: every version of other tools knows them."""
    words: Json = {"ffn_hidden_size": config.intermediate_size}
    one_norm = config.shared_norm or not config.parallel_residual
    if one_norm and config.kv_heads in (1, config.num_heads):
        return words | {
            "new_decoder_architecture": False,
            "multi_query": config.kv_heads == 1,
            "parallel_attn": config.parallel_residual,
        }
    return words | {
        "new_decoder_architecture": True,
        "num_kv_heads": config.kv_heads,
        "num_ln_in_parallel_attn": 1 if config.shared_norm else 2,
    }


FIXED = {"norm": "layernorm", "mlp": "plain"}
FALCON = {
    **FIXED,
    "activation": "gelu",
    "tie_embeddings": True,
    "parallel_residual": True,
    "vocab_size": 65024,
    "max_seq_length": 2048,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
B7 = {**FALCON, **shape(32, 4544, 71, 1, 18176), "shared_norm": True}
B40 = {**FALCON, **shape(60, 8192, 128, 8, 32768)}
B180 = {**FALCON, **shape(80, 14848, 232, 8, 59392)}

FAMILY = Family(
    name="falcon",
    architecture="FalconForCausalLM",
    model_type="falcon",
    weights=_weights,
    words=WORDS,
    fixed=FIXED,
    # Position by a bias that grows with distance (arXiv:2108.12409), in Falcon-RW.
    constants={"alibi": False},
    parse_more=_parse,
    more_words=_words,
    models=table(
        "falcon",
        size("falcon-7b", "tiiuae/", B7),
        size("falcon-7b-instruct", "tiiuae/", B7),
        size("falcon-40b", "tiiuae/", B40),
        size("falcon-40b-instruct", "tiiuae/", B40),
        size("falcon-180B", "tiiuae/", B180),
        size("falcon-180B-chat", "tiiuae/", B180),
    ),
)

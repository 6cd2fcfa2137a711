"""Pythia (arXiv:2304.01373), the GPT-NeoX architecture: LayerNorm, GELU, parallel residual, biases,
rotary over a quarter of each head, query, key and value in one matrix on disk.

`vocab_size` has the rows of the files; the tokenizer's ids end at 50276, the rest is padding.
"""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.family import (
    Family,
    Json,
    Model,
    Weight,
    need,
    parse_rope,
    required,
    rope_scaling_words,
)

_LAYER = "gpt_neox.layers.{i}."
WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", ("embed.weight",)),
    Weight(_LAYER + "input_layernorm.weight", ("layers.{i}.attn_norm.weight",)),
    Weight(_LAYER + "input_layernorm.bias", ("layers.{i}.attn_norm.bias",)),
    Weight(
        _LAYER + "attention.query_key_value.weight",
        ("layers.{i}.attn.q.weight", "layers.{i}.attn.k.weight", "layers.{i}.attn.v.weight"),
    ),
    Weight(
        _LAYER + "attention.query_key_value.bias",
        ("layers.{i}.attn.q.bias", "layers.{i}.attn.k.bias", "layers.{i}.attn.v.bias"),
    ),
    Weight(_LAYER + "attention.dense.weight", ("layers.{i}.attn.o.weight",)),
    Weight(_LAYER + "attention.dense.bias", ("layers.{i}.attn.o.bias",)),
    Weight(_LAYER + "post_attention_layernorm.weight", ("layers.{i}.mlp_norm.weight",)),
    Weight(_LAYER + "post_attention_layernorm.bias", ("layers.{i}.mlp_norm.bias",)),
    Weight(_LAYER + "mlp.dense_h_to_4h.weight", ("layers.{i}.mlp.up.weight",)),
    Weight(_LAYER + "mlp.dense_h_to_4h.bias", ("layers.{i}.mlp.up.bias",)),
    Weight(_LAYER + "mlp.dense_4h_to_h.weight", ("layers.{i}.mlp.down.weight",)),
    Weight(_LAYER + "mlp.dense_4h_to_h.bias", ("layers.{i}.mlp.down.bias",)),
    Weight("gpt_neox.final_layer_norm.weight", ("norm.weight",)),
    Weight("gpt_neox.final_layer_norm.bias", ("norm.bias",)),
    Weight("embed_out.weight", ("head.weight",)),
)


def _settings(config: ModelConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_parallel_residual": config.parallel_residual,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rope_fraction,
        "rope_scaling": rope_scaling_words(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _parse(raw: Json) -> ModelConfig:
    need(raw, "hidden_act", ("gelu",), "gelu")
    theta, scaling = parse_rope(raw, "rotary_emb_base")
    fraction = (raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    bias = raw.get("attention_bias", True)
    return ModelConfig(
        vocab_size=required(raw, "vocab_size"),
        max_seq_length=raw.get("max_position_embeddings", 2048),
        hidden_size=required(raw, "hidden_size"),
        num_layers=required(raw, "num_hidden_layers"),
        num_heads=required(raw, "num_attention_heads"),
        intermediate_size=required(raw, "intermediate_size"),
        norm="layernorm",
        norm_eps=raw.get("layer_norm_eps", 1e-5),
        mlp="gelu",
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        parallel_residual=raw.get("use_parallel_residual", True),
        rope_theta=theta,
        rope_fraction=raw.get("rotary_pct", 0.25) if fraction is None else fraction,
        rope_scaling=scaling,
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


#         layers, width, heads, context, rows
SIZES = {
    "14m": (6, 128, 4, 512, 50304),
    "31m": (6, 256, 8, 1024, 50304),
    "70m": (6, 512, 8, 2048, 50304),
    "160m": (12, 768, 12, 2048, 50304),
    "410m": (24, 1024, 16, 2048, 50304),
    "1b": (16, 2048, 8, 2048, 50304),
    "1.4b": (24, 2048, 16, 2048, 50304),
    "2.8b": (32, 2560, 32, 2048, 50304),
    "6.9b": (32, 4096, 32, 2048, 50432),
    "12b": (36, 5120, 40, 2048, 50688),
}


def _models() -> dict[str, Model]:
    """Every size, and its twin trained on the deduplicated Pile where LitGPT lists one."""
    out = {}
    for size, (layers, hidden, heads, context, rows) in SIZES.items():
        twins = (f"pythia-{size}", f"pythia-{size}-deduped")
        for name in twins[:1] if size in ("14m", "31m") else twins:
            config = ModelConfig(
                name=name,
                family="pythia",
                vocab_size=rows,
                max_seq_length=context,
                num_layers=layers,
                hidden_size=hidden,
                num_heads=heads,
                intermediate_size=4 * hidden,
                norm="layernorm",
                mlp="gelu",
                qkv_bias=True,
                attention_out_bias=True,
                mlp_bias=True,
                parallel_residual=True,
                rope_fraction=0.25,
                bos_token_id=0,
                eos_token_id=0,
            )
            out[name] = Model(f"EleutherAI/{name}", config)
    return out


FAMILY = Family(
    name="pythia",
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    weights=WEIGHTS,
    dropped=(
        r"\.rotary_emb\.inv_freq$",
        r"\.attention\.bias$",
        r"\.attention\.masked_bias$",
    ),
    settings=_settings,
    parse=_parse,
    models=_models(),
)

"""Models of the Llama architecture: RMSNorm, SwiGLU, grouped queries, rotary over whole heads."""

from __future__ import annotations

from typing import Any

from gristmill.config.model import ModelConfig, RopeScaling
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

WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed.weight",)),
    Weight("model.layers.{i}.input_layernorm.weight", ("layers.{i}.attn_norm.weight",)),
    Weight("model.layers.{i}.self_attn.q_proj.weight", ("layers.{i}.attn.q.weight",)),
    Weight("model.layers.{i}.self_attn.q_proj.bias", ("layers.{i}.attn.q.bias",)),
    Weight("model.layers.{i}.self_attn.k_proj.weight", ("layers.{i}.attn.k.weight",)),
    Weight("model.layers.{i}.self_attn.k_proj.bias", ("layers.{i}.attn.k.bias",)),
    Weight("model.layers.{i}.self_attn.v_proj.weight", ("layers.{i}.attn.v.weight",)),
    Weight("model.layers.{i}.self_attn.v_proj.bias", ("layers.{i}.attn.v.bias",)),
    Weight("model.layers.{i}.self_attn.o_proj.weight", ("layers.{i}.attn.o.weight",)),
    Weight("model.layers.{i}.self_attn.o_proj.bias", ("layers.{i}.attn.o.bias",)),
    Weight("model.layers.{i}.post_attention_layernorm.weight", ("layers.{i}.mlp_norm.weight",)),
    Weight("model.layers.{i}.mlp.gate_proj.weight", ("layers.{i}.mlp.gate.weight",)),
    Weight("model.layers.{i}.mlp.gate_proj.bias", ("layers.{i}.mlp.gate.bias",)),
    Weight("model.layers.{i}.mlp.up_proj.weight", ("layers.{i}.mlp.up.weight",)),
    Weight("model.layers.{i}.mlp.up_proj.bias", ("layers.{i}.mlp.up.bias",)),
    Weight("model.layers.{i}.mlp.down_proj.weight", ("layers.{i}.mlp.down.weight",)),
    Weight("model.layers.{i}.mlp.down_proj.bias", ("layers.{i}.mlp.down.bias",)),
    Weight("model.norm.weight", ("norm.weight",)),
    Weight("lm_head.weight", ("head.weight",)),
)


def _settings(config: ModelConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling_words(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _parse(raw: Json) -> ModelConfig:
    need(raw, "hidden_act", ("silu",), "silu")
    theta, scaling = parse_rope(raw)
    hidden, heads = required(raw, "hidden_size"), required(raw, "num_attention_heads")
    head_dim = raw.get("head_dim")
    return ModelConfig(
        vocab_size=required(raw, "vocab_size"),
        max_seq_length=raw.get("max_position_embeddings", 2048),
        hidden_size=hidden,
        num_layers=required(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=None if head_dim == hidden // heads else head_dim,
        intermediate_size=required(raw, "intermediate_size"),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        qkv_bias=raw.get("attention_bias", False),
        attention_out_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


MODELS: dict[str, Model] = {}


def _add(repos: dict[str, str | None], *parts: dict[str, Any]) -> None:
    """Models that differ in name only: name -> Hugging Face repository; later parts win."""
    settings = {key: value for part in parts for key, value in part.items()}
    for name, repo in repos.items():
        MODELS[name] = Model(repo, ModelConfig(name=name, family="llama", **settings))


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": inner,
    }


# Shapes that several generations share.
B7 = _shape(32, 4096, 32, 32, 11008)
B8 = _shape(32, 4096, 32, 8, 14336)
B13 = _shape(40, 5120, 40, 40, 13824)
B34 = _shape(48, 8192, 64, 8, 22016)
B70 = _shape(80, 8192, 64, 8, 28672)
B405 = _shape(126, 16384, 128, 8, 53248)

# Llama 2 (arXiv:2307.09288) and models tuned from it.
LLAMA_2 = {
    "vocab_size": 32000,
    "max_seq_length": 4096,
    "norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_add(
    {
        "Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
        "Llama-2-7b-chat-hf": "meta-llama/Llama-2-7b-chat-hf",
        "Platypus2-7B": "garage-bAInd/Platypus2-7B",
    },
    B7,
    LLAMA_2,
)
_add(
    {
        "Llama-2-7b-chat-hf-function-calling-v2": "Trelis/Llama-2-7b-chat-hf-function-calling-v2",
    },
    B7,
    LLAMA_2,
    {"norm_eps": 1e-06},
)
_add(
    {
        "Llama-2-13b-hf": "meta-llama/Llama-2-13b-hf",
        "Llama-2-13b-chat-hf": "meta-llama/Llama-2-13b-chat-hf",
        "Platypus2-13B": "garage-bAInd/Platypus2-13B",
        "Camel-Platypus2-13B": "garage-bAInd/Camel-Platypus2-13B",
        "Stable-Platypus2-13B": "garage-bAInd/Stable-Platypus2-13B",
    },
    B13,
    LLAMA_2,
)
_add(
    {
        "Llama-2-70b-hf": "meta-llama/Llama-2-70b-hf",
        "Llama-2-70b-chat-hf": "meta-llama/Llama-2-70b-chat-hf",
        "FreeWilly2": "stabilityai/FreeWilly2",
        "Platypus2-70B": "garage-bAInd/Platypus2-70B",
        "Platypus2-70B-instruct": "garage-bAInd/Platypus2-70B-instruct",
        "Camel-Platypus2-70B": "garage-bAInd/Camel-Platypus2-70B",
    },
    B70,
    LLAMA_2,
)
# Tuned from the first Llama (arXiv:2302.13971).
_add(
    {
        "Platypus-30B": "garage-bAInd/Platypus-30B",
    },
    _shape(60, 6656, 52, 52, 17920),
    LLAMA_2,
    {"max_seq_length": 2048, "norm_eps": 1e-06},
)

# Code Llama (arXiv:2308.12950). Those that fill in the middle have 16 more rows.
CODE_LLAMA = {**LLAMA_2, "max_seq_length": 16384, "rope_theta": 1e6}
INFILL = {**CODE_LLAMA, "vocab_size": 32016}
_add(
    {
        "CodeLlama-7b-hf": "codellama/CodeLlama-7b-hf",
        "CodeLlama-7b-Instruct-hf": "codellama/CodeLlama-7b-Instruct-hf",
    },
    B7,
    INFILL,
)
_add(
    {
        "CodeLlama-13b-hf": "codellama/CodeLlama-13b-hf",
        "CodeLlama-13b-Instruct-hf": "codellama/CodeLlama-13b-Instruct-hf",
    },
    B13,
    INFILL,
)
_add(
    {
        "CodeLlama-7b-Python-hf": "codellama/CodeLlama-7b-Python-hf",
    },
    B7,
    CODE_LLAMA,
)
_add(
    {
        "CodeLlama-13b-Python-hf": "codellama/CodeLlama-13b-Python-hf",
    },
    B13,
    CODE_LLAMA,
)
_add(
    {
        "CodeLlama-34b-hf": "codellama/CodeLlama-34b-hf",
        "CodeLlama-34b-Python-hf": "codellama/CodeLlama-34b-Python-hf",
        "CodeLlama-34b-Instruct-hf": "codellama/CodeLlama-34b-Instruct-hf",
    },
    B34,
    CODE_LLAMA,
)
_add(
    {
        "CodeLlama-70b-hf": "codellama/CodeLlama-70b-hf",
        "CodeLlama-70b-Python-hf": "codellama/CodeLlama-70b-Python-hf",
        "CodeLlama-70b-Instruct-hf": "codellama/CodeLlama-70b-Instruct-hf",
    },
    B70,
    INFILL,
)

# Llama 3, 3.1, 3.2, 3.3 (arXiv:2407.21783).
LLAMA_3 = {
    "vocab_size": 128256,
    "max_seq_length": 8192,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA_3_CHAT = {**LLAMA_3, "eos_token_id": 128009}
LONG = {"max_seq_length": 131072, "rope_scaling": RopeScaling(factor=8.0)}
LONGER = {"max_seq_length": 131072, "rope_scaling": RopeScaling(factor=32.0)}
_add(
    {
        "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    },
    B8,
    LLAMA_3,
)
_add(
    {
        "Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    },
    B8,
    LLAMA_3_CHAT,
)
_add(
    {
        "Llama-3-70B": "meta-llama/Meta-Llama-3-70B",
    },
    B70,
    LLAMA_3,
)
_add(
    {
        "Llama-3-70B-Instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    },
    B70,
    LLAMA_3_CHAT,
)
_add(
    {
        "Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B",
    },
    B8,
    LLAMA_3,
    LONG,
)
_add(
    {
        "Llama-3.1-8B-Instruct": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    },
    B8,
    LLAMA_3_CHAT,
    LONG,
)
_add(
    {
        "Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    },
    B70,
    LLAMA_3,
    LONG,
)
_add(
    {
        "Llama-3.1-70B-Instruct": "meta-llama/Meta-Llama-3.1-70B-Instruct",
        "Llama-3.1-Nemotron-70B-Instruct-HF": "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF",
        "Llama-3.3-70B-Instruct": "meta-llama/Llama-3.3-70B-Instruct",
    },
    B70,
    LLAMA_3_CHAT,
    LONG,
)
_add(
    {
        "Llama-3.1-405B": "meta-llama/Meta-Llama-3.1-405B",
    },
    B405,
    LLAMA_3,
    LONG,
)
_add(
    {
        "Llama-3.1-405B-Instruct": "meta-llama/Meta-Llama-3.1-405B-Instruct",
    },
    B405,
    LLAMA_3_CHAT,
    LONG,
)
B1_32 = {**_shape(16, 2048, 32, 8, 8192), "tie_embeddings": True}
B3_32 = {**_shape(28, 3072, 24, 8, 8192), "tie_embeddings": True}
_add(
    {
        "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    },
    B1_32,
    LLAMA_3,
    LONGER,
)
_add(
    {
        "Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
    },
    B1_32,
    LLAMA_3_CHAT,
    LONGER,
)
_add(
    {
        "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    },
    B3_32,
    LLAMA_3,
    LONGER,
)
_add(
    {
        "Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B-Instruct",
    },
    B3_32,
    LLAMA_3_CHAT,
    LONGER,
)

# DeepSeek-R1 distilled into Llama 3 (arXiv:2501.12948).
_add(
    {
        "R1-Distill-Llama-8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    },
    B8,
    LLAMA_3,
    LONG,
)
_add(
    {
        "R1-Distill-Llama-70B": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    },
    B70,
    LLAMA_3,
    LONG,
)

# TinyLlama (arXiv:2401.02385) and MicroLlama.
TINY = {**LLAMA_2, "max_seq_length": 2048}
_add(
    {
        "tiny-llama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "tiny-llama-1.1b-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    },
    _shape(22, 2048, 32, 4, 5632),
    TINY,
)
_add(
    {
        "micro-llama-300M": "keeeeenw/MicroLlama",
    },
    _shape(12, 1024, 16, 4, 5632),
    TINY,
)

# OpenLLaMA, https://github.com/openlm-research/open_llama
OPEN = {**LLAMA_2, "max_seq_length": 2048, "norm_eps": 1e-6}
_add(
    {
        "open_llama_3b": "openlm-research/open_llama_3b",
    },
    _shape(26, 3200, 32, 32, 8640),
    OPEN,
)
_add(
    {
        "open_llama_7b": "openlm-research/open_llama_7b",
    },
    B7,
    OPEN,
)
_add(
    {
        "open_llama_13b": "openlm-research/open_llama_13b",
    },
    B13,
    OPEN,
)

# SmolLM2 (arXiv:2502.02737). The Instruct models talk between <|im_start|> and <|im_end|>.
SMOL = {
    "vocab_size": 49152,
    "max_seq_length": 8192,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMOL_CHAT = {**SMOL, "bos_token_id": 1, "eos_token_id": 2}
for _size, _sizes, _theta in (
    ("135M", _shape(30, 576, 9, 3, 1536), 1e5),
    ("360M", _shape(32, 960, 15, 5, 2560), 1e5),
    ("1.7B", _shape(24, 2048, 32, 32, 8192), 1.3e5),
):
    _base, _chat = f"SmolLM2-{_size}", f"SmolLM2-{_size}-Instruct"
    _add(
        {
            _base: f"HuggingFaceTB/{_base}",
        },
        _sizes,
        SMOL,
        {"rope_theta": _theta},
    )
    _add(
        {
            _chat: f"HuggingFaceTB/{_chat}",
        },
        _sizes,
        SMOL_CHAT,
        {"rope_theta": _theta},
    )

# Salamandra (arXiv:2502.08489).
SALAMANDRA = {
    "vocab_size": 256000,
    "max_seq_length": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
for _size, _sizes, _eps in (
    ("2b", _shape(24, 2048, 16, 16, 5440), 1e-5),
    ("7b", _shape(32, 4096, 32, 8, 11008), 1e-6),
):
    _base, _chat = f"salamandra-{_size}", f"salamandra-{_size}-instruct"
    _add(
        {
            _base: f"BSC-LT/{_base}",
            _chat: f"BSC-LT/{_chat}",
        },
        _sizes,
        SALAMANDRA,
        {"norm_eps": _eps},
    )

# Ours, for a processor without a GPU: a few minutes of training give readable text.
_add(
    {
        "gristmill-nano": None,
    },
    _shape(4, 256, 4, 2, 768),
    {"vocab_size": 2048, "max_seq_length": 256, "tie_embeddings": True},
)

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    weights=WEIGHTS,
    dropped=(r"\.rotary_emb\.inv_freq$",),
    settings=_settings,
    parse=_parse,
    models=MODELS,
)

"""Every family as `transformers` builds it, tiny: the cases of `test_families.py`.

A line is a name, the class without `Config` and `ForCausalLM`, and what differs from `TINY`.
"""

from __future__ import annotations

from typing import Any

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    # Large enough that a wrong sign or order shows.
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
THETA = {"rope_theta": 5e3}
PAD = {"pad_token_id": None}  # their default is beyond these rows

Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {}

# llama
CASES |= {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-scaled": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-linear": ("Llama", {"rope_parameters": {**LINEAR, **THETA}}),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, **THETA}}),
    "llama-longrope": (
        "Llama",
        {
            "rope_parameters": {
                **THETA,
                "rope_type": "longrope",
                "factor": 6.0,  # not the ratio of the contexts
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 3.0, 5.0],
            }
        },
    ),
    "llama-gelu": ("Llama", {"hidden_act": "gelu", "rms_norm_eps": 1e-3}),
}

# mistral
CASES |= {
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 16}),
}

# qwen2, qwen3
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CASES |= {
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", {"num_key_value_heads": 2, **SOME_WINDOWS}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-windows": ("Qwen3", {"num_key_value_heads": 2, "attention_bias": True, **SOME_WINDOWS}),
}

# smollm3
CASES |= {
    "smollm3": ("SmolLM3", {**PAD, "num_hidden_layers": 4, "num_key_value_heads": 2}),
    "smollm3-windows": (
        "SmolLM3",
        {
            **PAD,
            "num_key_value_heads": 2,
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": False,
        },
    ),
}

# pythia
CASES |= {
    "neox-parallel": ("GPTNeoX", {"use_parallel_residual": True}),
    "neox-sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
        },
    ),
    "neox-tied": ("GPTNeoX", {"tie_word_embeddings": True}),
    "neox-no-bias": ("GPTNeoX", {"attention_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
}

# stablelm
CASES |= {
    "stablelm": ("StableLm", {"num_key_value_heads": 4}),
    "stablelm-parallel": (
        "StableLm",
        {
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
            "use_qkv_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
        },
    ),
}

# falcon
CASES |= {
    "falcon-7b": ("Falcon", {"ffn_hidden_size": 48}),
    "falcon-40b": (
        "Falcon",
        {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-one-norm": (
        "Falcon",
        {
            "ffn_hidden_size": 48,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-sequential": (
        "Falcon",
        {"ffn_hidden_size": 48, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
}

# gpt2; its classes drop out 0.1 unless they are told
KEEP = {"n_inner": 48, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CASES |= {
    "gpt2": ("GPT2", KEEP),
    "gpt2-untied": (
        "GPT2",
        {**KEEP, "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
}

YARN8 = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
    "rope_theta": 5e5,
}
# olmo, olmo2, olmo3
CASES |= {
    "olmo": ("Olmo", {}),
    "olmo-clip": (
        "Olmo",
        {
            "clip_qkv": 0.5,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "olmo2-bias": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": (
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": YARN8,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "olmo3-pattern": (
        "Olmo3",
        {
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
}

# nanochat
CASES |= {
    "nanochat": ("NanoChat", {"num_key_value_heads": 2, "final_logit_softcapping": 2.0}),
    "nanochat-bias": (
        "NanoChat",
        {"attention_bias": True, "final_logit_softcapping": None, "tie_word_embeddings": True},
    ),
}

# starcoder2
CASES |= {
    "starcoder2": ("Starcoder2", {"num_key_value_heads": 2, "sliding_window": 8}),
    "starcoder2-plain": (
        "Starcoder2",
        {"num_key_value_heads": 4, "use_bias": False, "tie_word_embeddings": False},
    ),
}

# deepseek_v2, deepseek_v3
LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
NO_MTP = {"num_nextn_predict_layers": 0}
LITE = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}
CASES |= {
    "deepseek_v2": ("DeepseekV2", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v2-lite": ("DeepseekV2", {**LATENT, **LITE, "rope_parameters": LATENT_YARN}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **NO_MTP, "rope_parameters": LATENT_YARN}),
    "deepseek_v3-lite": ("DeepseekV3", {**LATENT, **LITE, **NO_MTP, "rms_norm_eps": 1e-5}),
}

# mixtral, qwen3_moe
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
CASES |= {
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "head_dim": 8}),
    "mixtral-window": (
        "Mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 1,
            "sliding_window": 8,
            "head_dim": 16,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 8, "norm_topk_prob": True}),
    "qwen3_moe-dense": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "num_experts": 4,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
}

# gemma, gemma2, gemma3
GEMMA = {**PAD, "num_key_value_heads": 2, "head_dim": 16}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
CASES |= {
    "gemma": ("Gemma", GEMMA),
    "gemma-untied": (
        "Gemma",
        {**PAD, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma2": ("Gemma2", {**GEMMA, **CAPS, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma2-no-caps": (
        "Gemma2",
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3-scaled": (
        "Gemma3Text",
        {
            **GEMMA,
            "final_logit_softcapping": 3.0,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
}

# phi, phi3
LONGROPE = {
    "type": "longrope",  # left in by transformers 5 where 4 wrote it
    "rope_type": "longrope",
    "rope_theta": 5e3,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 5.0],
}
PHI3 = {**PAD, "num_key_value_heads": 2}
CASES |= {
    "phi": ("Phi", {"num_key_value_heads": 2}),
    "phi-silu": ("Phi", {"hidden_act": "silu", "rope_parameters": {"partial_rotary_factor": 1.0}}),
    "phi3": ("Phi3", {**PHI3, "sliding_window": 8}),
    "phi3-long": (
        "Phi3",
        {**PHI3, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "phi3-short": (
        "Phi3",
        {
            **PHI3,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 48,
            "tie_word_embeddings": True,
        },
    ),
}

# seed_oss
SEED = {**PAD, "attention_dropout": 0.0, "residual_dropout": 0.0}
CASES |= {
    "seed_oss": ("SeedOss", {**SEED, "num_key_value_heads": 2, "head_dim": 12}),
    "seed_oss-biases": (
        "SeedOss",
        {
            **SEED,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}

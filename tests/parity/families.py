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

Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {}

# llama
CASES |= {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-scaled": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
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
    "neox-no-bias": ("GPTNeoX", {"attention_bias": False}),
}

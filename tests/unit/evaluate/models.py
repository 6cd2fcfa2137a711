"""Tiny random models of every kind that attention and positions come in."""

import torch

from gristmill.config.model import LatentAttention, MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.infer.load import LoadedModel
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights

SHAPES = {
    "grouped": {"num_kv_heads": 2, "tie_embeddings": True, "logit_softcap": 8.0},
    "parallel": {
        "norm": "layernorm",
        "mlp": "plain",
        "activation": "gelu",
        "parallel_residual": True,
        "rope_fraction": 0.25,
        "num_token_ids": 59,
        "head_bias": True,
    },
    "windows": {
        "num_layers": 3,
        "sliding_window": 5,
        "sliding_pattern": (True, False),
        "rope_local_theta": 500.0,
        "attention_softcap": 20.0,
    },
    "latent": {
        "latent_attention": LatentAttention(
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
    },
    "experts": {"moe": MixtureOfExperts(num_experts=4, intermediate_size=16, num_dense_layers=1)},
    "learned": {"positions": "learned", "norm": "layernorm", "qk_norm": "head"},
    "dynamic": {
        "rope_scaling": RopeScaling(kind="dynamic", factor=4.0, original_max_seq_length=16)
    },
}


def tiny(shape="grouped", context=64):
    """A model far enough from uniform that no two answers tie."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        max_seq_length=context,
        **{"num_layers": 2, **SHAPES[shape]},
    )
    model = Decoder(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.eval()


def loaded(model, precision="32-true"):
    """The model without a tokenizer, which scoring does not ask for."""
    return LoadedModel("tiny", model, None, torch.device("cpu"), precision)

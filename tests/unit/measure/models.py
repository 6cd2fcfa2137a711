"""Tiny random models of every kind that attention and positions come in."""

import json

import torch
from tests.unit.models.test_decoding import tiny as model_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from gristmill.config.model import LatentAttention, MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.formats import hf
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
    return model_of(SHAPES[shape], context)


def loaded(model, precision="32-true"):
    """The model without a tokenizer, which scoring does not ask for."""
    return LoadedModel("tiny", model, None, torch.device("cpu"), precision)


def write_model(folder, context=96, template=None):
    """A random model with a tokenizer of bytes, as a Hugging Face directory."""
    words = folder / "tokenizer"
    words.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(words / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (words / "chat_template.jinja").write_text(template)
    config = ModelConfig(
        vocab_size=258,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        max_seq_length=context,
    )
    model = Decoder(config)
    init_weights(model, seed=7)
    hf.write(folder / "model", config, dict(model.state_dict()), tokenizer_dir=words)
    return folder / "model"

"""LitGPT's words for a model: both directions, what each side lacks, and older spellings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gristmill.config.model import LatentAttention, MixtureOfExperts, RopeScaling
from gristmill.models import zoo
from gristmill.models.zoo.litgpt import parse, words
from gristmill.util.errors import UserError

TINY = replace(
    zoo.get("tiny-llama-1.1b"),
    name="tiny",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
)


@pytest.mark.parametrize("name", sorted(zoo.models()))
def test_words_come_back(name):
    config = zoo.get(name)
    try:
        raw = words(config)
    except UserError:  # what it says is for another test
        return
    found = parse(raw)
    assert found.name == config.name
    moe = found.moe and replace(found.moe, balance_loss=config.moe.balance_loss)
    found = replace(found, moe=moe, tie_embeddings=config.tie_embeddings)
    assert zoo.family(config.family).expresses(found)
    assert words(found) == raw


LATENT = LatentAttention(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_length=32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"embedding_norm": True}, "embedding_norm=True"),
        ({"positions": "learned"}, "positions=learned"),
        ({"embedding_scale": 3.0}, "embedding_scale=3.0"),
        ({"qkv_clip": 8.0}, "qkv_clip=8.0"),
        ({"attention_out_bias": True}, "attention_out_bias=True"),
        ({"activation": "relu2"}, "activation=relu2"),
        ({"rope_pattern": (True, False)}, "rope_pattern=(True, False)"),
        ({"rope_scaling": YARN}, "rope_scaling="),
        ({"latent_attention": LATENT, "num_kv_heads": None}, "latent_attention without q_lora"),
        (
            {"rope_local_theta": 1e4, "rope_theta": 1e6},
            "rope_indices and sliding_window_indices differ",
        ),
        (
            {"moe": MixtureOfExperts(num_experts=4, intermediate_size=8, normalize=False)},
            "moe=",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_litgpt_cannot_express_is_named(change, told):
    with pytest.raises(UserError, match="LitGPT cannot express") as error:
        words(replace(TINY, **change))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32, "beta_slow": 1}}, "YaRN"),
        ({"rope_condense_ratio": 2, "rope_adjustments": {"factor": 2.0}}, "rope_condense_ratio"),
        ({"rope_interleave": True}, "rope_interleave"),
        ({"norm_1": False}, "norm_1 is False and norm_2 is True"),
        ({"post_mlp_norm": True}, "post_mlp_norm is True"),
        ({"norm_qk": True, "norm_class_name": "LayerNorm"}, "norm_qk"),
        ({"norm_class_name": "BatchNorm"}, "norm_class_name is 'BatchNorm'"),
        ({"mlp_class_name": "LLaMAMoE", "bias": True}, "bias is true in a model with experts"),
        ({"rope_local_base_freq": 1e4, "rope_indices": [0, 1]}, "rope_indices"),
        ({"rope_local_base_freq": 1e4, "rope_indices": [0]}, "rope_indices has 1 values for 2"),
        ({"sliding_window_size": 4, "sliding_window_indices": [1]}, "has 1 values for 2 blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_words_that_we_cannot_compute_are_refused(change, told):
    with pytest.raises(UserError, match=told):
        parse(words(TINY) | change)


def test_words_of_older_versions():
    raw = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 100, "padding_multiple": 64}
    config = parse(raw)
    assert (config.vocab_size, config.intermediate_size) == (128, 256)
    assert (config.mlp, config.parallel_residual, config.rope_fraction) == ("plain", True, 0.25)
    windows = raw | {"sliding_window_size": 8}
    assert parse(windows).windows == (8, 8, 8, 8)
    for word in (
        {"sliding_window_layer_placing": "interleaved"},
        {"sliding_window_layer_stride": 2},
    ):
        assert parse(windows | word).windows == (8, None, 8, None)
    assert parse(raw | {"use_flash": False, "tie": None}) == config


def test_switches_that_are_in_the_name():
    offset = replace(TINY, norm_unit_offset=True)
    assert words(offset)["name"] == "Gemma-tiny"
    assert words(replace(TINY, name="my-Gemma"))["name"] == "my-gemma"
    plain = replace(TINY, name="like-OLMo", norm="layernorm")
    assert words(plain)["name"] == "like-olmo"
    assert words(replace(plain, name="x", norm_weight=False))["name"] == "OLMo-x"
    for config in (offset, plain, replace(plain, norm_weight=False)):
        found = parse(words(config))
        assert (found.name, found.norm_unit_offset) == (config.name, config.norm_unit_offset)
        assert found.norm_weight == config.norm_weight
    known = words(zoo.get("pythia-14m"), repository="EleutherAI/pythia-14m")
    assert known["hf_config"]["org"] == "EleutherAI"
    assert known["name"] == "pythia-14m"


def test_numbers_are_exact():
    for scale in (256**-0.5, 144**-0.5, 0.1, math.pi):
        config = replace(TINY, attention_scale=scale)
        assert parse(words(config)).score_scale == pytest.approx(scale, rel=1e-12)
    assert parse(words(replace(TINY, rope_theta=500000.5))).rope_theta == 500000.5

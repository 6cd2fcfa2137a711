"""Rotary settings of `config.json`: both generations, both directions, as transformers reads."""

import math
from dataclasses import replace

import pytest

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models import zoo
from gristmill.models.zoo.rope_words import parse_rope, rope_words
from gristmill.util.errors import UserError

FACTORS = {"short_factors": (1.0, 1.5) * 4, "long_factors": (2.0, 3.5) * 4}
SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=4.0),
    "dynamic": RopeScaling(kind="dynamic", factor=2.0, original_max_seq_length=256),
    "llama3": RopeScaling(factor=8.0, original_max_seq_length=64, high_freq_factor=5.0),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_seq_length=64),
    "yarn-all": RopeScaling(
        kind="yarn",
        factor=40.0,
        original_max_seq_length=64,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        mscale=1.0,
        mscale_all_dim=0.5,
        attention_factor=1.5,
    ),
    "longrope": RopeScaling(kind="longrope", factor=4.0, original_max_seq_length=64, **FACTORS),
    "longrope-all": RopeScaling(
        kind="longrope", factor=6.0, original_max_seq_length=64, attention_factor=1.5, **FACTORS
    ),
}
CONFIG = ModelConfig(hidden_size=64, num_heads=4, max_seq_length=256, rope_theta=5e4)


def raw_of(config: ModelConfig, theta_key: str = "rope_theta") -> dict:
    words = rope_words(config, theta_key)
    return {"max_position_embeddings": config.max_seq_length, **words}


@pytest.mark.parametrize("theta_key", ["rope_theta", "rotary_emb_base"])
@pytest.mark.parametrize("name", SCALINGS)
def test_nothing_is_lost_on_the_way_out_and_back(name, theta_key):
    plain = replace(CONFIG, rope_scaling=SCALINGS[name])
    for config in (
        plain,
        replace(plain, rope_fraction=0.25),
        replace(plain, rope_local_theta=2e4, sliding_window=8),
    ):
        parsed = parse_rope(raw_of(config, theta_key), theta_key)
        start = replace(CONFIG, rope_theta=1.0, sliding_window=config.sliding_window)
        assert replace(start, **parsed) == config


@pytest.mark.parametrize("name", SCALINGS)
def test_transformers_reads_what_we_write(name):
    """The rotary table of a model that it builds from our words is ours."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    from gristmill.models.rope import rope_tables

    config = replace(CONFIG, rope_scaling=SCALINGS[name])
    common = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8}
    is_long = name.startswith("longrope")
    kind = transformers.Phi3Config if is_long else transformers.LlamaConfig
    embedding = Phi3RotaryEmbedding if is_long else LlamaRotaryEmbedding
    theirs = embedding(kind(**common, pad_token_id=0, **raw_of(config)))
    for length in (60, 300):
        positions = torch.arange(length)[None]
        expected = theirs(torch.zeros(1), positions)
        for ours, table in zip(rope_tables(config, positions, length), expected, strict=True):
            torch.testing.assert_close(ours[:, :, 0], table[..., :8], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_newer_files_say_the_same(name):
    """What transformers 5 writes for what it read from us."""
    transformers = pytest.importorskip("transformers")
    config = replace(CONFIG, rope_scaling=SCALINGS[name])
    common = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8, "pad_token_id": 0}
    is_long = name.startswith("longrope")
    kind = transformers.Phi3Config if is_long else transformers.LlamaConfig
    written = kind(**common, **raw_of(config)).to_dict()
    assert "rope_scaling" not in written
    assert replace(replace(CONFIG, rope_theta=1.0), **parse_rope(written)) == config


@pytest.mark.parametrize("attention", [None, 1.5])
def test_a_factor_that_is_not_the_ratio_of_the_contexts(attention):
    """transformers 4 takes the ratio instead, and what is multiplied by from the file."""
    long = replace(SCALINGS["longrope"], factor=6.0, attention_factor=attention)
    words = rope_words(replace(CONFIG, rope_scaling=long))["rope_scaling"]
    expected = attention or math.sqrt(1 + math.log(6) / math.log(64))
    assert words["attention_factor"] == pytest.approx(expected, rel=1e-12)


def test_missing_words_leave_the_default_of_the_architecture():
    assert parse_rope({}) == {"rope_scaling": None}
    assert parse_rope({"rope_scaling": None, "rope_theta": 7}) == {
        "rope_scaling": None,
        "rope_theta": 7.0,
    }


def test_original_context_is_the_whole_where_it_is_not_named():
    raw = {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 2}}
    expected = RopeScaling(kind="yarn", factor=2.0, original_max_seq_length=512)
    assert parse_rope(raw)["rope_scaling"] == expected
    named = raw | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}
    expected = RopeScaling(kind="yarn", factor=8.0, original_max_seq_length=64)
    assert parse_rope(named)["rope_scaling"] == expected


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_older_names_of_longrope(kind):
    raw = {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": kind, "short_factor": [1, 1.5] * 4, "long_factor": [2, 3.5] * 4},
    }
    assert parse_rope(raw)["rope_scaling"] == SCALINGS["longrope"]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}


def by_type(full: dict, sliding: dict) -> dict:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def test_settings_by_layer_type():
    plain, local = {"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
    assert parse_rope(by_type(plain | LLAMA3, local)) == {
        "rope_theta": 1e6,
        "rope_local_theta": 1e4,
        "rope_scaling": SCALINGS["llama3"],
    }
    assert parse_rope(by_type(plain, plain)) == {"rope_theta": 1e6, "rope_scaling": None}
    # The same base with and without scaling is still two tables.
    assert parse_rope(by_type(plain | LLAMA3, plain))["rope_local_theta"] == 1e6
    assert parse_rope({"rope_theta": 1e6, "rope_local_base_freq": 1e4}) == {
        "rope_theta": 1e6,
        "rope_local_theta": 1e4,
        "rope_scaling": None,
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rope_scaling": {"type": "ntk"}}, "'ntk'. Supported: default, linear, dynamic, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "max_position_embeddings is miss"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "max_position_embeddings is missing"),
        (
            {"max_position_embeddings": 8, "rope_scaling": {"type": "longrope", "factor": 2}},
            "short_factor is missing",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "llama_4_scaling_beta=0.1, which is not supported",
        ),
        (by_type({"rope_theta": 1e4}, {}), "lacks 'sliding_attention'"),
        ({"rope_parameters": {"full_attention": {}, "chunked": {}}}, "has 'chunked'"),
        (by_type({"rope_theta": 1e4}, LLAMA3), "sliding_attention are of type 'llama3'"),
        (
            by_type({"partial_rotary_factor": 0.5}, {"rope_theta": 1e4}),
            "two values of partial_rotary_factor",
        ),
    ],
)
def test_what_is_not_supported_is_named(raw, message):
    with pytest.raises(UserError, match=message):
        parse_rope(raw)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES.values() if f.name != "gpt2"])
def test_switches_of_rotation_that_an_architecture_lacks_are_refused(family):
    config = next(iter(family.models.values())).config
    words = family.to_hf_config(config)
    fraction = {**words, "rope_parameters": {"partial_rotary_factor": 0.5}}
    local = {**words, "rope_parameters": None, "rope_local_base_freq": 77.0}
    if "rope_fraction" in family.rotary:
        assert family.from_hf_config(fraction).rope_fraction == 0.5
    else:
        with pytest.raises(UserError, match=r"partial_rotary_factor is 0.5. Supported: 1.0"):
            family.from_hf_config(fraction)
    if "rope_local_theta" in family.rotary:
        changed = replace(config, rope_local_theta=77.0)
        again = family.from_hf_config(family.to_hf_config(changed))
        assert again.rope_local_theta == 77.0
    else:
        with pytest.raises(UserError, match="blocks with a sliding window is 77.0"):
            family.from_hf_config(local)

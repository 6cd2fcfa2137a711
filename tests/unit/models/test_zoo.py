import json
from dataclasses import asdict, replace
from math import prod

import pytest

from gristmill.config.model import MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.models.zoo.weights import conversions
from gristmill.util.errors import UserError


def test_names_are_sorted_and_stand_for_themselves():
    names = zoo.names()
    assert names == sorted(names)
    assert len(names) == len(set(names)) > 140
    for name in names:
        assert zoo.get(name).name == name


def test_no_two_families_have_a_name_in_common():
    assert sum(len(family.models) for family in zoo.FAMILIES.values()) == len(zoo.names())


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tiny-llama-1.1b-chat"),
        ("Meta-Llama-3-8B", "Llama-3-8B"),
        ("EleutherAI/pythia-14m", "pythia-14m"),
        ("llama-3.2-1b", "Llama-3.2-1B"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
    ],
)
def test_other_spellings(spelling, name):
    assert zoo.get(spelling).name == name


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("pythia-14mm", "pythia-14m"), ("EleutherAI/pythia-170m", "pythia-70m"), ("tinyllama", None)],
)
def test_unknown_name_shows_the_nearest(wrong, near):
    with pytest.raises(UserError, match=r"Unknown model .*gristmill pretrain list") as error:
        zoo.get(wrong)
    if near:
        assert near in str(error.value)


def test_far_off_name_suggests_nothing():
    with pytest.raises(UserError) as error:
        zoo.get("zzzzzzzz")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("name", zoo.names())
def test_every_size_is_sound_and_survives_its_config_json(name):
    config = zoo.get(name)
    assert config.num_heads % config.kv_heads == 0
    assert config.token_ids <= config.vocab_size
    family = zoo.family(config.family)
    words = family.to_hf_config(config)
    assert zoo.family_of(words) is family
    assert family.from_hf_config(words) == config
    assert zoo.config_from_dict(asdict(config)) == config


@pytest.mark.parametrize("name", zoo.names())
def test_every_parameter_of_every_size_has_one_place_in_its_files(name):
    config = zoo.get(name)
    # Two blocks of each sort are all that names depend on.
    dense = config.moe.num_dense_layers if config.moe else 0
    config = replace(config, num_layers=min(config.num_layers, dense + 2))
    parameters = parameter_shapes(config)
    table = conversions(zoo.family(config.family).weight_table(config), parameters)
    ours = [name for line in table for name in line.ours]
    theirs = [name for line in table for name in line.theirs]
    assert sorted(ours) == sorted(parameters)
    assert len(set(theirs)) == len(theirs)
    assert not any("{" in name for name in theirs)


def test_parameters_are_as_many_as_their_makers_say():
    """In millions, of models whose heads are and are not embeddings of their own."""
    for name, millions in {
        "pythia-14m": 14.1,
        "SmolLM2-135M": 134.5,
        "Qwen2.5-0.5B": 494.0,
        "Qwen3-0.6B": 596.0,
        "Llama-3.2-1B": 1235.8,
        "Qwen2.5-3B": 3085.9,
        "SmolLM3-3B": 3075.1,
        "Qwen3-4B": 4022.5,
        "Llama-2-7b-hf": 6738.4,
        "Mistral-7B-v0.1": 7241.7,
        "Qwen2.5-7B": 7615.6,
        "Falcon3-7B-Base": 7455.6,
        "Llama-3-8B": 8030.3,
        "Qwen3-8B": 8190.7,
        "Mistral-Nemo-Base-2407": 12247.8,
        "Mistral-Large-Instruct-2407": 122610.1,
    }.items():
        count = sum(prod(shape) for shape in parameter_shapes(zoo.get(name)).values())
        assert count / 1e6 == pytest.approx(millions, abs=0.06), name


def test_repositories_are_those_of_the_models():
    repositories = zoo.repositories()
    assert "EleutherAI/pythia-14m" in repositories
    assert None not in repositories
    assert all(zoo.get(repo).name for repo in repositories)
    assert zoo.models()["pythia-14m"].url == "https://huggingface.co/EleutherAI/pythia-14m"
    assert zoo.models()["gristmill-nano"].url is None


BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
}


def test_both_generations_of_rope_settings_are_read():
    family = zoo.family("llama")
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 512
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    configs = [family.from_hf_config(BASE | rope) for rope in (old, new)]
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 5e5
    assert configs[0].rope_scaling == RopeScaling(factor=8.0, original_max_seq_length=512)


@pytest.mark.parametrize(("name", "theta"), [("llama", 10000.0), ("smollm3", 2e6)])
def test_an_architecture_has_a_base_of_its_own(name, theta):
    assert zoo.family(name).from_hf_config(BASE).rope_theta == theta
    assert zoo.family(name).from_hf_config(BASE | {"rope_theta": 7}).rope_theta == 7.0


def test_share_of_heads_that_neox_rotates():
    partial = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert zoo.family("pythia").from_hf_config(BASE | partial).rope_fraction == 0.5
    assert zoo.family("pythia").from_hf_config(BASE | {"rotary_pct": 0.3}).rope_fraction == 0.3
    assert zoo.family("pythia").from_hf_config(BASE).rope_fraction == 0.25


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({}, [4096] * 4),
        ({"sliding_window": None}, [None] * 4),
        ({"sliding_window": 8}, [8] * 4),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 4}, [None] * 4),
    ],
)
def test_window_of_mistral_is_in_every_block_or_none(said, windows):
    config = zoo.family("mistral").from_hf_config(BASE | said)
    assert list(config.windows) == windows
    assert (
        zoo.family("mistral").from_hf_config(zoo.family("mistral").to_hf_config(config)) == config
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({"sliding_window": 8, "max_window_layers": 2}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": 8}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": None}, [None] * 4),
        ({"use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 4096]),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            [None, 8, 8, 8],
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [8, None, 8, None],
        ),
    ],
)
def test_windows_of_qwen_are_in_the_upper_blocks_if_switched_on(family, said, windows):
    config = zoo.family(family).from_hf_config(BASE | said)
    assert list(config.windows) == windows
    words = zoo.family(family).to_hf_config(config)
    assert list(zoo.family(family).from_hf_config(words).windows) == windows
    assert words["use_sliding_window"] == any(windows)


def test_blocks_of_smollm3_that_do_not_rotate():
    family = zoo.family("smollm3")
    assert family.from_hf_config(BASE).rotates == (True, True, True, False)
    every = family.from_hf_config(BASE | {"no_rope_layer_interval": 2})
    assert every.rotates == (True, False, True, False)
    named = family.from_hf_config(BASE | {"no_rope_layers": [0, 1, 1, 0]})
    assert named.rotates == (False, True, True, False)
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert family.from_hf_config(BASE | window).windows == (None, None, None, 8)
    assert family.from_hf_config(BASE | {"sliding_window": 8}).windows == (None,) * 4
    assert zoo.get("SmolLM3-3B").rotates[:8] == (True, True, True, False) * 2


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "ntk", "factor": 2}}, "'ntk'. Supported: default"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'. Supported: silu"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5. Supported: 1.0"),
        ("llama", {"rope_local_base_freq": 5.0}, "blocks with a sliding window is 5.0"),
        (
            "mistral",
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "layer_types has both",
        ),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"]}, "'chunked"),
    ],
)
def test_unsupported_settings_are_named(family, change, message):
    with pytest.raises(UserError, match=message):
        zoo.family(family).from_hf_config(BASE | change)


def test_unsupported_architecture_shows_the_supported():
    with pytest.raises(UserError, match=r"'BertModel' is not supported.*LlamaForCausalLM, "):
        zoo.family_of({"architectures": ["BertModel"], "model_type": "bert"})
    assert zoo.family_of({"model_type": "gpt_neox"}).name == "pythia"
    with pytest.raises(UserError, match="Unknown model family 'lama'. Families: llama, "):
        zoo.family("lama")


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gristmill-nano", {"norm": "layernorm"}, "norm=layernorm"),
        ("gristmill-nano", {"qkv_bias": True}, "attention_out_bias=False"),
        ("gristmill-nano", {"parallel_residual": True}, "parallel_residual=True"),
        ("gristmill-nano", {"sliding_window": 8}, "sliding_window=8"),
        ("pythia-14m", {"mlp": "gated"}, "mlp=gated"),
        ("pythia-14m", {"num_kv_heads": 2}, "num_kv_heads=2"),
        ("Qwen3-0.6B", {"qk_norm": "none"}, "qk_norm=none"),
        ("Qwen2.5-0.5B", {"qkv_bias": False}, "qkv_bias=False"),
        ("Mistral-7B-v0.1", {"sliding_pattern": (True, False)}, "sliding_pattern="),
        ("Llama-3-8B", {"rope_scaling": RopeScaling(kind="linear", beta_fast=9)}, "rope_scaling="),
    ],
)
def test_what_an_architecture_cannot_say_is_refused(name, change, named):
    config = replace(zoo.get(name), **change)
    with pytest.raises(UserError, match=f"cannot express .*{named}"):
        zoo.family(config.family).to_hf_config(config)
    assert not zoo.family(config.family).expresses(config)


def test_a_share_of_heads_where_heads_are_rotated_whole_is_refused():
    config = replace(zoo.get("gristmill-nano"), rope_fraction=0.5)
    with pytest.raises(UserError, match="partial_rotary_factor is 0.5. Supported: 1.0"):
        zoo.family("llama").to_hf_config(config)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Llama-3.2-1B", "llama"),
        ("Mistral-7B-v0.1", "mistral"),
        ("Mistral-7B-v0.3", "llama"),  # without a window the two are one
        ("Qwen2.5-0.5B", "qwen2"),
        ("Qwen3-4B", "qwen3"),
        ("SmolLM3-3B", "smollm3"),
        ("pythia-70m", "pythia"),
    ],
)
def test_family_is_found_from_the_switches(name, family):
    config = zoo.get(name)
    assert zoo.family_for(replace(config, family="?")) == replace(config, family=family)


def test_several_end_ids_are_kept():
    llama = zoo.family("llama")
    words = llama.to_hf_config(zoo.get("Llama-3.1-8B-Instruct"))
    config = llama.from_hf_config(words | {"eos_token_id": [128009, 128001]})
    assert config.eos_token_id == (128009, 128001)
    assert llama.to_hf_config(config)["eos_token_id"] == [128009, 128001]
    assert zoo.config_from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert replace(config, eos_token_id=(2,)) == replace(config, eos_token_id=2)


def test_configuration_of_a_newer_version_is_refused():
    with pytest.raises(UserError, match=r"unknown settings \(gadget\). Update gristmill"):
        zoo.config_from_dict(asdict(ModelConfig()) | {"gadget": 1})


def test_a_custom_model_finds_a_family_that_expresses_it():
    plain = ModelConfig(num_layers=2)
    assert zoo.with_family(plain) == plain
    experts = MixtureOfExperts(num_experts=4, intermediate_size=plain.intermediate_size)
    assert zoo.with_family(replace(plain, moe=experts)).family == "mixtral"
    nowhere = replace(plain, moe=experts, embedding_norm=True, qkv_clip=1.0)
    assert zoo.with_family(nowhere) == nowhere

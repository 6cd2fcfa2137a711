from dataclasses import asdict, replace

import pytest

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.util.errors import UserError


def test_names_are_sorted_and_stand_for_themselves():
    names = zoo.names()
    assert names == sorted(names)
    assert len(names) == len(set(names)) > 70
    for name in names:
        assert zoo.get(name).name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tiny-llama-1.1b-chat"),
        ("Meta-Llama-3-8B", "Llama-3-8B"),
        ("EleutherAI/pythia-14m", "pythia-14m"),
        ("llama-3.2-1b", "Llama-3.2-1B"),
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
    assert config.num_heads * config.head_size == config.hidden_size
    assert config.num_heads % config.kv_heads == 0
    assert config.token_ids == config.vocab_size
    family = zoo.family(config.family)
    words = family.to_hf_config(config)
    assert zoo.family_of(words) is family
    assert family.from_hf_config(words) == config
    assert zoo.config_from_dict(asdict(config)) == config


def test_repositories_are_those_of_the_models():
    repositories = zoo.repositories()
    assert "EleutherAI/pythia-14m" in repositories
    assert None not in repositories
    assert all(zoo.get(repo).name for repo in repositories)
    assert zoo.models()["pythia-14m"].url == "https://huggingface.co/EleutherAI/pythia-14m"


@pytest.mark.parametrize("name", ["gristmill-nano", "SmolLM2-1.7B", "pythia-14m"])
def test_weight_names_invert(name):
    config = zoo.get(name)
    parameters = parameter_shapes(config)
    table = zoo.family(config.family).weight_names(parameters)
    ours = [name for names in table.values() for name in names]
    assert sorted(ours) == sorted(parameters)


def test_weight_table_names_every_parameter_once():
    for family in zoo.FAMILIES.values():
        theirs = [weight.theirs for weight in family.weights]
        ours = [name for weight in family.weights for name in weight.ours]
        assert len(set(theirs)) == len(theirs)
        assert len(set(ours)) == len(ours)


def test_both_generations_of_rope_settings_are_read():
    family = zoo.family("llama")
    base = {
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
    }
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 512
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    configs = [family.from_hf_config(base | rope) for rope in (old, new)]
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 5e5
    assert configs[0].rope_scaling == RopeScaling(factor=8.0, original_max_seq_length=512)
    assert family.from_hf_config(base).rope_theta == 10000.0
    partial = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert zoo.family("pythia").from_hf_config(base | partial).rope_fraction == 0.5
    assert zoo.family("pythia").from_hf_config(base | {"rotary_pct": 0.3}).rope_fraction == 0.3
    assert zoo.family("pythia").from_hf_config(base).rope_fraction == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn'. Supported: default"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'. Supported: silu"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_unsupported_settings_are_named(change, message):
    family = zoo.family("llama")
    with pytest.raises(UserError, match=message):
        family.from_hf_config(family.to_hf_config(zoo.get("gristmill-nano")) | change)


def test_unsupported_architecture_shows_the_supported():
    with pytest.raises(UserError, match=r"'BertModel' is not supported.*LlamaForCausalLM, GPTNeoX"):
        zoo.family_of({"architectures": ["BertModel"], "model_type": "bert"})
    assert zoo.family_of({"model_type": "gpt_neox"}).name == "pythia"
    with pytest.raises(UserError, match="Unknown model family 'lama'. Families: llama, pythia"):
        zoo.family("lama")


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"norm": "layernorm"}, "norm=layernorm"),
        ("llama", {"qkv_bias": True}, "attention_out_bias=False"),
        ("llama", {"rope_fraction": 0.5, "parallel_residual": True}, "parallel_residual=True"),
        ("pythia", {"mlp": "swiglu"}, "mlp=swiglu"),
        ("pythia", {"num_kv_heads": 2}, "num_kv_heads=2"),
    ],
)
def test_what_an_architecture_cannot_say_is_refused(family, change, named):
    start = zoo.get("gristmill-nano" if family == "llama" else "pythia-14m")
    with pytest.raises(UserError, match=f"cannot express .*{named}"):
        zoo.family(family).to_hf_config(replace(start, **change))


def test_several_end_ids_read_as_the_first():
    words = zoo.family("llama").to_hf_config(zoo.get("Llama-3.1-8B-Instruct"))
    config = zoo.family("llama").from_hf_config(words | {"eos_token_id": [128009, 128001]})
    assert config.eos_token_id == 128009


def test_configuration_of_a_newer_version_is_refused():
    with pytest.raises(UserError, match=r"unknown settings \(gadget\). Update gristmill"):
        zoo.config_from_dict(asdict(ModelConfig()) | {"gadget": 1})

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.formats import hf
from gristmill.formats.model_dir import load_model, load_weights, read_config
from gristmill.models import zoo
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.util.errors import UserError

CONFIG = replace(
    zoo.get("gristmill-nano"),
    vocab_size=64,
    num_token_ids=60,
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    rope_scaling=RopeScaling(factor=4.0),
)
NEOX = replace(
    zoo.get("pythia-14m"), vocab_size=64, hidden_size=32, num_layers=2, intermediate_size=128
)


def random_model(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write_checkpoint(path: Path, model: Decoder) -> None:
    (path / "weights").mkdir(parents=True)
    save_file(model.state_dict(), path / "weights" / "shard-00001-model-00001-of-00001.safetensors")
    (path / "config.json").write_text(json.dumps({"gristmill": 1, **asdict(model.config)}))
    (path / "checkpoint.json").write_text("{}")


@pytest.fixture(params=[CONFIG, NEOX], ids=["separate", "fused"])
def model(request) -> Decoder:
    return random_model(request.param)


@pytest.fixture
def final(tmp_path, model) -> Path:
    hf.write(tmp_path / "final", model.config, model.state_dict(), tokenizer_dir=None)
    return tmp_path / "final"


def edit(directory: Path, change) -> None:
    """Rewrite the weights after `change(tensors)`."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_written_directory_reads_back_bitwise(model, final):
    loaded = load_model(final)
    assert not loaded.training
    assert loaded.config == model.config == read_config(final)
    assert_same(loaded, model)


def test_checkpoint_reads_back_bitwise(model, tmp_path):
    write_checkpoint(tmp_path / "step-00000010", model)
    loaded = load_model(tmp_path / "step-00000010")
    assert loaded.config == model.config
    assert_same(loaded, model)


def test_weights_go_into_a_model_of_any_dtype(model, final):
    target = Decoder(model.config).bfloat16()
    load_weights(target, final)
    assert_same(target, model.bfloat16())
    assert_same(load_model(final, dtype=torch.bfloat16), model)


def test_put_receives_full_values(model, final):
    target = Decoder(model.config)
    names = {parameter: name for name, parameter in target.named_parameters()}
    seen = {}
    load_weights(target, final, put=lambda p, value: seen.update({names[p]: value}))
    expected = model.state_dict()
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_run_directory_stands_for_final_else_its_newest_checkpoint(tmp_path):
    run, newest = tmp_path / "run", random_model(CONFIG)
    write_checkpoint(run / "step-00000900", random_model(CONFIG))
    write_checkpoint(run / "step-00001000", newest)
    write_checkpoint(run / "step-00002000", random_model(CONFIG))
    (run / "step-00002000" / "checkpoint.json").unlink()
    assert_same(load_model(run), newest)
    with pytest.raises(UserError, match="step-00002000 is an unfinished checkpoint"):
        read_config(run / "step-00002000")
    last = random_model(CONFIG)
    hf.write(run / "final", CONFIG, last.state_dict(), tokenizer_dir=None)
    assert_same(load_model(run), last)


def test_downloads_are_found_by_their_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = random_model(CONFIG)
    target = tmp_path / "checkpoints" / "org" / "model"
    hf.write(target, CONFIG, written.state_dict(), tokenizer_dir=None)
    assert_same(load_model("org/model"), written)


def test_no_model_there(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist. Name a model directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no model directory \(no config.json"):
        read_config(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is no model file"):
        read_config(tmp_path / "file")


def test_bad_config_json_is_named(final):
    file = final / "config.json"
    words = json.loads(file.read_text())
    file.write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_config(final)
    file.write_text(json.dumps(words | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"final/config\.json: hidden_act is 'relu'"):
        read_config(final)
    file.write_text(json.dumps(words | {"architectures": ["T5Model"]}))
    with pytest.raises(UserError, match=r"config\.json: Architecture 'T5Model' is not supported"):
        read_config(final)
    file.write_text(json.dumps({"gristmill": 99}))
    with pytest.raises(UserError, match=r"format version 99 is newer"):
        read_config(final)


@pytest.mark.parametrize(
    "text", ["[]", '"x"', '{"architectures": ["LlamaForCausalLM"], "rope_scaling": "linear"}']
)
def test_config_json_of_another_form_is_named(final, text):
    sound = json.loads((final / "config.json").read_text())
    value = json.loads(text)
    value = sound | value if isinstance(value, dict) else value
    (final / "config.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"config\.json (is damaged|has a value of a wrong kind)"):
        read_config(final)


def test_missing_tensor_is_named(final):
    edit(final, lambda tensors: tensors.pop(sorted(tensors)[-1]))
    with pytest.raises(UserError, match=r"final: 1 of \d+ tensors are missing, the first is "):
        load_model(final)


def test_tensor_without_a_place_is_named(final):
    edit(final, lambda tensors: tensors.update({"model.extra.bias": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"model\.safetensors: tensor model\.extra\.bias has no"):
        load_model(final)


def test_tensor_of_another_shape_is_named(final):
    file = final / "config.json"
    words = json.loads(file.read_text())
    words["intermediate_size"] += 1
    file.write_text(json.dumps(words))
    wanted = words["intermediate_size"]
    with pytest.raises(
        UserError, match=rf"tensor \S*mlp\S* is .*, but the configuration makes .*{wanted}"
    ):
        load_model(final)


def test_weights_of_another_model_do_not_fit(final, model):
    other = Decoder(replace(model.config, num_layers=3))
    with pytest.raises(UserError, match=r"do not fit the model: layers\.2\S+ is absent there"):
        load_weights(other, final)
    other = Decoder(replace(model.config, vocab_size=80))
    with pytest.raises(UserError, match=r"embed\.weight is \[64, 32\] there and \[80, 32\]"):
        load_weights(other, final)


def test_copy_of_a_tied_head_is_passed_over(tmp_path):
    model = random_model(CONFIG)
    hf.write(tmp_path / "final", CONFIG, model.state_dict(), tokenizer_dir=None)
    edit(tmp_path / "final", lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}))
    assert_same(load_model(tmp_path / "final"), model)


def test_tables_of_old_files_are_passed_over(tmp_path):
    model = random_model(NEOX)
    hf.write(tmp_path / "final", NEOX, model.state_dict(), tokenizer_dir=None)
    old = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    edit(tmp_path / "final", lambda tensors: tensors.update(old))
    assert_same(load_model(tmp_path / "final"), model)


def test_pickled_weights_load(final, model):
    file = final / "model.safetensors"
    torch.save(load_file(file), final / "pytorch_model.bin")
    file.unlink()
    assert_same(load_model(final), model)

"""`gristmill inspect`: what a path is, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gristmill.cli import main


@pytest.fixture
def look(capsys):
    """Run inspect; gives (exit code, JSON, message)."""

    def run(path: Path | str) -> tuple[int, dict, str]:
        capsys.readouterr()
        code = main(["inspect", str(path), "--json", "true"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else {}, said.err

    return run


def test_a_run(world, capsys):
    assert main(["inspect", str(world / "run")]) == 0
    page = capsys.readouterr().out
    for words in (
        "run directory",
        "20 of 20 steps, 5,120 tokens",
        "3, the newest is step-00000020, and final/",
        "LlamaForCausalLM",
        "43,168",
        "384 rows, 300 token ids",
        "float32, 21 tensors",
        "chat template no",
        f"gristmill chat {world / 'run'}",
    ):
        assert words in page
    assert "going on" not in page


def test_a_stopped_run_says_that_its_command_goes_on(own_run, capsys):
    (own_run / "step-00000020").rename(own_run.parent / "gone")
    assert main(["inspect", str(own_run)]) == 0
    page = capsys.readouterr().out
    assert "of 20 steps" in page
    assert "going on      the command that it was started with" in page


def test_a_run_for_programs(world, look):
    code, found, _ = look(world / "run")
    assert code == 0
    assert found["complete"] is True
    assert found["kind"] == "run directory"
    assert found["training"]["step"] == found["training"]["total_steps"] == 20
    assert found["training"]["checkpoints"][0] == "step-00000020"
    assert found["model"]["dtypes"] == {"float32": 43168}
    assert found["tokenizer"]["num_token_ids"] == 300


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("run/step-00000020", "training checkpoint"),
        ("run/step-00000020/config.json", "training checkpoint"),
        ("run/final", "Hugging Face directory"),
        ("run/final/config.json", "Hugging Face directory"),
        ("run/final/model.safetensors", "Hugging Face directory"),
        ("tokenizer", "tokenizer"),
        ("tokenizer/tokenizer.json", "tokenizer file"),
    ],
)
def test_other_things(world, look, place, kind):
    code, found, _ = look(world / place)
    assert code == 0
    assert found["kind"] == kind
    assert found["commands"]


def test_a_dataset(world, look, tmp_path):
    words = ["prepare", "textfiles", "--input_dir", str(world / "novels")]
    words += ["--tokenizer_dir", str(world / "tokenizer"), "--output_dir", str(tmp_path / "d")]
    assert main([*words, "--val_fraction", "0.1"]) == 0
    code, found, _ = look(tmp_path / "d")
    assert code == 0
    assert found["kind"] == "dataset"
    assert found["dataset"]["parts"] == ["train", "val"]
    assert found["dataset"]["tokens"] > 10_000
    assert f"gristmill data stats {tmp_path / 'd'}" in found["commands"]


def test_settings_without_weights(world, look, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "checkpoints/org/name"
    shutil.copytree(world / "run/final", place)
    (place / "model.safetensors").unlink()
    code, found, _ = look("org/name")
    assert code == 0
    assert "no weights" in found["kind"]
    assert found["model"]["parameters"] == 43168
    assert "gristmill download org/name" in found["commands"]


def break_run(run: Path, how: str) -> Path:
    """Damage a copy of the run in one of the ways that happen; gives what to look at."""
    step, final = run / "step-00000020", run / "final"
    weights = next(step.glob("weights/*.safetensors"))
    model = final / "model.safetensors"
    config = json.loads((final / "config.json").read_text())
    match how:
        case "record":
            (step / "checkpoint.json").unlink()
        case "flipped record":
            text = (step / "checkpoint.json").read_text()
            (step / "checkpoint.json").write_text(text.replace('"step": 20', '"step": 21'))
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "gone":
            next(step.glob("optimizer/*.safetensors")).unlink()
        case "final cut":
            model.write_bytes(model.read_bytes()[:-10])
            return final
        case "other shape":
            (final / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
            return final
        case "more layers":
            (final / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
            return final
        case "unknown":
            config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
            (final / "config.json").write_text(json.dumps(config))
            return final
        case "json":
            (final / "config.json").write_text("{")
            return final
        case "index":
            index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
            (final / "model.safetensors.index.json").write_text(json.dumps(index))
            return final
        case "tokenizer":
            (final / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))
            return final
    return step


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("record", "it has no checkpoint.json"),
        ("flipped record", "checkpoint.json is damaged (wrong digest)"),
        ("cut", "bytes, not"),
        ("gone", "is missing. Go on from an earlier checkpoint"),
        ("final cut", "is cut off: tensor"),
        ("other shape", "has another size than config.json makes it (6 such tensors)"),
        ("more layers", "tensors are missing, the first is model.layers.2"),
        ("unknown", "'MambaForCausalLM' is not supported"),
        ("json", "config.json is damaged"),
        ("index", "model-00001-of-00002.safetensors is missing"),
        ("tokenizer", "the tokenizer has ids up to 299, the model 290 rows"),
    ],
)
def test_what_is_wrong(own_run, look, how, says):
    place = break_run(own_run, how)
    code, found, message = look(place)
    assert code == 2
    assert found["complete"] is False
    assert says in message
    assert says in " ".join(found["problems"])
    assert message.count("error: ") == 1


def test_an_unfinished_save_beside_good_ones(own_run, look):
    (own_run / "step-00000024").mkdir()
    code, found, _ = look(own_run)
    assert code == 0
    assert found["training"]["unfinished"] == ["step-00000024"]


def test_an_old_rest_of_a_download_beside_a_whole_model(own_run, look):
    parts = own_run / "final/.gristmill/download"
    parts.mkdir(parents=True)
    (parts / "x.part").write_bytes(b"x")
    assert look(own_run / "final")[0] == 0


def test_weights_without_a_configuration(own_run, look):
    (own_run / "final/model.safetensors").rename(own_run.parent / "alone.safetensors")
    code, found, _ = look(own_run.parent / "alone.safetensors")
    assert code == 0
    assert found["model"]["dtypes"] == {"float32": 43168}
    code, found, _ = look(next(own_run.glob("step-00000020/weights/*.safetensors")))
    assert (code, found["kind"]) == (0, "training checkpoint")


def test_a_model_in_a_pickle_is_not_read(own_run, look, monkeypatch):
    """The types come from the head of the file."""
    import torch
    from safetensors.torch import load_file

    from gristmill.formats import source

    file = own_run / "final/model.safetensors"
    torch.save(load_file(file), own_run / "final/pytorch_model.bin")
    file.unlink()
    monkeypatch.setattr(source.Tensors, "__getitem__", lambda self, name: pytest.fail(name))
    code, found, _ = look(own_run / "final/pytorch_model.bin")
    assert code == 0
    assert found["model"]["dtypes"] == {"float32": 43168}


def test_an_unfinished_download(tmp_path, look):
    parts = tmp_path / "m/.gristmill/download"
    parts.mkdir(parents=True)
    (parts / "x.part").write_bytes(b"x")
    (tmp_path / "m/config.json").write_text("{}")
    code, found, message = look(tmp_path / "m")
    assert code == 2
    assert found["kind"] == "unfinished download"
    assert "gristmill download" in message


@pytest.mark.parametrize("name", ["absent", "empty", "note.txt"])
def test_nothing_known(tmp_path, look, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("x")
    code, found, message = look(tmp_path / name)
    assert code == 2
    assert not found
    assert name in message


def test_a_path_is_needed(capsys):
    assert main(["inspect"]) == 2
    assert "gristmill inspect out/run" in capsys.readouterr().err

"""Models to other tools and back, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small
import torch
import yaml
from safetensors.torch import load_file

from gristmill.cli import main


def said(capsys, *words: object, code: int = 0) -> tuple[str, str]:
    """Standard output and error of a command that must end with `code`."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out = capsys.readouterr()
    return out.out, out.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def first_loss(run: Path) -> float:
    return next(row["loss"] for row in small.metrics(run) if row["step"] == 1)


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("source", ["run", "run/step-00000020", "run/final"])
def test_every_face_of_a_run_is_the_same_model(world, tmp_path, capsys, source):
    out, _ = said(capsys, "export", world / source, tmp_path / "hf")
    assert "43,168 parameters as float32" in out
    assert "model.safetensors" in out
    assert equal(tmp_path / "hf", world / "run/final")
    mine, theirs = (
        json.loads((p / "config.json").read_text()) for p in (tmp_path / "hf", world / "run/final")
    )
    assert mine == theirs


def test_there_and_back_through_litgpt(world, tmp_path, capsys):
    said(capsys, "export", world / "run", tmp_path / "lit", "--format", "litgpt")
    config = yaml.safe_load((tmp_path / "lit/model_config.yaml").read_text())
    assert (config["n_layer"], config["n_query_groups"]) == (2, 2)
    assert (tmp_path / "lit/tokenizer.json").exists()
    flat = torch.load(tmp_path / "lit/lit_model.pth", weights_only=True)
    assert flat["transformer.h.1.attn.qkv.weight"].shape == (64, 32)
    said(capsys, "convert_from_litgpt", tmp_path / "lit", tmp_path / "back")
    assert equal(tmp_path / "back", world / "run/final")


def test_there_and_back_through_gguf(world, tmp_path, capsys):
    pytest.importorskip("gguf")
    said(capsys, "export", world / "run", tmp_path / "m.gguf", "--format", "gguf")
    said(capsys, "export", tmp_path / "m.gguf", tmp_path / "back")
    assert equal(tmp_path / "back", world / "run/final")
    out, _ = said(capsys, "inspect", tmp_path / "m.gguf")
    assert "GGUF file" in out
    out, _ = said(capsys, "export", world / "run", tmp_path / "q", "--format=gguf", "--dtype=q8_0")
    assert "within the rounding of q8_0" in out
    assert [path.suffix for path in (tmp_path / "q").iterdir()] == [".gguf"]


def test_the_next_commands_of_litgpts_users(world, tmp_path, capsys):
    """Their tutorial: convert a training's end, go on from it with other data, write text."""
    converted = tmp_path / "converted"
    out, _ = said(capsys, "convert_pretrained_checkpoint", world / "run/final", converted)
    assert f"gristmill pretrain --initial_checkpoint_dir {converted}" in out
    command = small.pretrain(world, tmp_path / "next", "--initial_checkpoint_dir", str(converted))
    assert main(command) == 0
    assert first_loss(tmp_path / "next") < first_loss(world / "run")
    out, _ = said(capsys, "generate", converted, "--prompt", "the mill", "--max_new_tokens", "5")
    assert out.strip()


def test_litgpts_files_are_added_in_place(world, tmp_path, capsys):
    here = Path(shutil.copytree(world / "run/final", tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    out, _ = said(capsys, "convert_to_litgpt", here, "--dtype", "bfloat16")
    assert f"litgpt chat {here}" in out
    after = {path.name: path.read_bytes() for path in here.iterdir()}
    assert set(after) - set(before) == {"lit_model.pth", "model_config.yaml"}
    assert all(after[name] == before[name] for name in before)
    state = torch.load(here / "lit_model.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert "has LitGPT's files already" in said(capsys, "convert_to_litgpt", here)[0]
    _, err = said(capsys, "convert_to_litgpt", world / "run/step-00000020", code=2)
    assert "--format litgpt" in err


@pytest.fixture
def litgpt_run(world, tmp_path) -> Path:
    """A run directory as LitGPT leaves one: weights, optimizer and counters in one file."""
    run = tmp_path / "litgpt-run"
    step = run / "step-00000100"
    assert main(["export", str(world / "run"), str(step), "--format", "litgpt"]) == 0
    flat = torch.load(step / "lit_model.pth", weights_only=True)
    state = {"model": flat, "optimizer": {"state": {}}, "iter_num": 400, "step_count": 100}
    torch.save(state, step / "lit_model.pth")
    return run


@pytest.mark.parametrize("place", ["", "step-00000100", "step-00000100/lit_model.pth"])
def test_anothers_training_checkpoint_starts_a_run_as_weights(
    world, litgpt_run, tmp_path, capsys, place
):
    out_dir = tmp_path / "new"
    words = small.pretrain(world, out_dir, "--resume", str(litgpt_run / place))
    out, err = said(capsys, *words)
    assert "begins at step 0 with its weights" in err
    assert first_loss(out_dir) < first_loss(world / "run")
    shutil.rmtree(out_dir / "final")
    shutil.rmtree(out_dir / "step-00000020")
    said(capsys, *words)  # the same command goes on with its own run
    assert [row["step"] for row in small.metrics(out_dir)] == list(range(21))


@pytest.mark.parametrize("place", ["", "step-00000100", "step-00000100/lit_model.pth"])
def test_anothers_run_is_known(litgpt_run, capsys, place):
    out, _ = said(capsys, "inspect", litgpt_run / place)
    for words in ("LitGPT checkpoint", "43,168", "float32", "300 ids", "yes, as far as"):
        assert words in out
    file = litgpt_run / "step-00000100/lit_model.pth"
    file.write_bytes(file.read_bytes()[:-20_000])
    _, err = said(capsys, "inspect", litgpt_run / place, code=2)
    assert "lit_model.pth" in err
    assert "Fetch or copy it again" in err


@pytest.mark.parametrize("kind", ["run", "litgpt", "lit_model.pth", "gguf"])
def test_a_run_starts_from_any_model_with_its_tokenizer(world, litgpt_run, tmp_path, kind):
    """And its checkpoints have the tokenizer in them, wherever the model keeps its own."""
    start = world / "run"
    if kind == "gguf":
        pytest.importorskip("gguf")
        assert main(["export", str(start), str(tmp_path / "m.gguf"), "--format", "gguf"]) == 0
        start = tmp_path / "m.gguf"
    elif kind != "run":
        start = litgpt_run if kind == "litgpt" else litgpt_run / "step-00000100/lit_model.pth"
    words = small.pretrain(world, tmp_path / "new", "--initial_checkpoint_dir", str(start))
    at = words.index("--tokenizer_dir")
    words = [w for w in words[:at] + words[at + 2 :] if not w.startswith("--model_config")]
    assert main([*words, "--train.max_steps", "2"]) == 0
    step = tmp_path / "new/step-00000002"
    assert (step / "tokenizer/tokenizer.json").is_file()
    assert first_loss(tmp_path / "new") < first_loss(world / "run")


def test_anothers_run_directory_is_left_alone(world, litgpt_run, capsys):
    before = (litgpt_run / "step-00000100/lit_model.pth").read_bytes()
    _, err = said(capsys, *small.pretrain(world, litgpt_run, "--resume", "auto"), code=2)
    assert "holds checkpoints of another tool" in err
    offered = err[err.index("Try:") :]
    assert f"--initial_checkpoint_dir {litgpt_run / 'step-00000100'}" in offered
    assert "--resume" not in offered
    assert (litgpt_run / "step-00000100/lit_model.pth").read_bytes() == before


def test_weights_to_start_from_that_are_not_there(world, tmp_path, monkeypatch, capsys):
    """LitGPT's tutorial fetches a tokenizer and then starts from weights that nobody fetched."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "checkpoints/EleutherAI/pythia-160m"
    words = small.pretrain(world, tmp_path / "run")
    words = [word for word in words if not word.startswith("--model_config")]
    words += ["--model_name", "pythia-160m", "--initial_checkpoint_dir", "EleutherAI/pythia-160m"]
    _, err = said(capsys, *words, code=2)
    assert "gristmill download EleutherAI/pythia-160m`" in err
    # Only the tokenizer and the settings were downloaded.
    shutil.copytree(world / "run/final", place)
    (place / "model.safetensors").unlink()
    _, err = said(capsys, *words, code=2)
    assert "no weights" in err
    assert "gristmill download EleutherAI/pythia-160m`" in err
    # Another model's weights.
    shutil.copy(world / "run/final/model.safetensors", place)
    _, err = said(capsys, *words, code=2)
    assert "of another model than pythia-160m (embed.weight is [384, 32] there" in err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_there(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = small.pretrain(world, tmp_path / "run", "--tokenizer_dir", "EleutherAI/pythia-14m")
    _, err = said(capsys, *words, code=2)
    assert "gristmill download EleutherAI/pythia-14m --tokenizer_only true" in err


def test_the_table_of_models(capsys):
    table = said(capsys, "pretrain", "list", "--verbose")[0].splitlines()
    names = said(capsys, "pretrain", "list")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == names
    assert len({len(line) for line in table}) == 1
    line = next(line for line in table if line.startswith("tiny-llama-1.1b "))
    assert line.split() == ["tiny-llama-1.1b", "1.10", "B", "22", "2048", "32/4", "2,048", "32,000"]

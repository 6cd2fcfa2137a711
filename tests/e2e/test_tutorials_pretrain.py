"""LitGPT's tutorial *Pretrain LLMs*, command by command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from small import metrics
from transformers import AutoModelForCausalLM
from tutorial_world import SHORT, folder_of_texts, is_used, run

from gristmill.cli import main
from gristmill.formats.model_dir import open_model_dir
from gristmill.models import zoo

pytestmark = pytest.mark.slow

CONTINUED = """litgpt pretrain pythia-160m \\
   --initial_checkpoint_dir EleutherAI/pythia-160m \\
   --tokenizer_dir EleutherAI/pythia-160m \\
   --out_dir ./new_pretrained_checkpoint \\
   --data TextFiles \\
   --data.train_data_path custom_pretraining_data \\
   --train.max_tokens 1_000_000"""
RESUMED = """litgpt pretrain pythia-160m \\
   --resume "auto" \\
   --tokenizer_dir EleutherAI/pythia-160m \\
   --out_dir ./new_pretrained_checkpoint \\
   --data TextFiles \\
   --data.train_data_path custom_pretraining_data \\
   --train.max_tokens 1_000_000"""
ON_NEW_DATA = """litgpt pretrain pythia-160m \\
   --initial_checkpoint_dir ./new_pretrained_checkpoint_converted \\
   --tokenizer_dir EleutherAI/pythia-160m \\
   --out_dir ./new_pretrained_checkpoint_2 \\
   --data TextFiles \\
   --data.train_data_path custom_pretraining_data_2 \\
   --train.max_tokens 1_000_000"""
# The runs as they stand, of a length for a test.
TOKENS = ("--train.max_tokens", "20_000")


def weights(path):
    return dict(open_model_dir(path).parameters())


def settings(out):
    return yaml.safe_load((out / "run.yaml").read_text())


def test_the_list(place, capsys):
    assert run("litgpt pretrain list") == 0
    names = capsys.readouterr().out.splitlines()
    assert names == sorted(names)
    assert {"Camel-Platypus2-13B", "Llama-2-7b-hf", "Mixtral-8x7B-v0.1", "pythia-14m"} <= set(names)


def test_the_options_of_a_data_module(place, capsys):
    with pytest.raises(SystemExit) as left:
        run("litgpt pretrain --data.help TextFiles")
    assert left.value.code == 0
    assert "train_data_path" in capsys.readouterr().out


def test_the_debug_configuration_by_its_address(place, capsys):
    line = """litgpt pretrain pythia-14m \\
   --config https://raw.githubusercontent.com/Lightning-AI/litgpt/main/config_hub/pretrain/debug.yaml
    """
    # 64 tokens for the 512 of the real model and corpus.
    short = ("--train.max_steps", "4", "--train.max_seq_length", "64", "--out_dir", "out/debug")
    assert run(line, *SHORT, *short) == 0
    said = capsys.readouterr()
    # Neither corpus nor tokenizer was there, and nothing asked for another command.
    assert "fetching pythia-14m's own" in said.err
    assert "fetching it once (gristmill download roneneldan/TinyStories" in said.err
    out = place / "out/debug"
    made = settings(out)
    assert made["length"]["global_batch_size"] == 125
    assert made["micro_batch_size"] == 5
    assert made["length"]["warmup_steps"] == 1  # the file's 100 are for its own length
    assert made["settings"]["optimizer"]["init_args"]["lr"] == 6e-4
    assert len(metrics(out)) >= 4
    assert (place / "data/tinystories/data00.json").is_file()
    assert run(line, *SHORT, *short) == 0
    assert "is finished" in capsys.readouterr().out


def test_pretraining_on_custom_data(place, capsys):
    folder_of_texts(place / "custom_pretraining_data")
    assert run("litgpt download EleutherAI/pythia-14m --tokenizer_only true") == 0
    assert not list((place / "checkpoints").rglob("*.safetensors"))
    # The tutorial lacks a backslash: its last line is no part of the command.
    line = """litgpt pretrain pythia-14m \\
   --tokenizer_dir EleutherAI/pythia-14m \\
   --data TextFiles \\
   --data.train_data_path custom_pretraining_data \\
   --train.lr_warmup_steps=200"""
    assert run(line, *SHORT) == 2
    said = capsys.readouterr().err
    # Typed, and longer than a run on so little text: LitGPT would not have left its warm-up.
    assert "lr_warmup_steps=200 is not shorter than the run" in said
    assert "--train.lr_warmup_steps" in said.split("Try:")[1]
    line = line.replace("=200", "=5") + " --optimizer.lr 0.005"
    assert run(line, *SHORT, "--train.max_steps", "10", "--out_dir", "out/own") == 0
    rows = [row for row in metrics(place / "out/own") if "lr" in row]
    assert max(row["lr"] for row in rows) == pytest.approx(0.005)
    assert settings(place / "out/own")["length"]["warmup_steps"] == 5


def test_continued_pretraining(place, monkeypatch, capsys):
    """The three commands, and the conversion between them."""
    folder_of_texts(place / "custom_pretraining_data")
    folder_of_texts(place / "custom_pretraining_data_2", 1)
    assert run("litgpt download EleutherAI/pythia-14m") == 0
    # The tutorial fetches one model and goes on with another.
    assert run(CONTINUED, *SHORT, *TOKENS) == 2
    assert "gristmill download EleutherAI/pythia-160m" in capsys.readouterr().err
    assert run("litgpt download EleutherAI/pythia-160m") == 0
    out = place / "new_pretrained_checkpoint"

    # Interrupted before its first checkpoint, LitGPT would begin again from random weights.
    assert run(CONTINUED, *SHORT, *TOKENS, "--train.max_time", "1s") in (0, 1)
    capsys.readouterr()
    assert run(RESUMED, *SHORT, *TOKENS) == 0
    said = capsys.readouterr().out
    assert "began with the weights of EleutherAI/pythia-160m" in said
    rows = metrics(out)
    assert [r["step"] for r in rows if "loss" in r] == list(
        range(1, settings(out)["length"]["total_steps"] + 1)
    )
    before, after = weights("EleutherAI/pythia-160m"), weights(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # it did train
    assert run(RESUMED, *SHORT, *TOKENS) == 0
    assert "is finished" in capsys.readouterr().out

    line = (
        "litgpt convert_pretrained_checkpoint ./new_pretrained_checkpoint/final "
        "./new_pretrained_checkpoint_converted"
    )
    assert run(line) == 0
    converted = place / "new_pretrained_checkpoint_converted"
    assert {"lit_model.pth", "model_config.yaml", "tokenizer.json"} <= {
        path.name for path in converted.iterdir()
    }
    assert run(line) == 2  # nothing is overwritten unasked
    assert "is there already" in capsys.readouterr().err
    assert run(ON_NEW_DATA, *SHORT, *TOKENS) == 0
    second = place / "new_pretrained_checkpoint_2"
    assert settings(second)["identity"]["initial_checkpoint_dir"].endswith("_converted")
    assert [r["step"] for r in metrics(second) if "loss" in r][0] == 1
    # Without the conversion it is the same run.
    line = ON_NEW_DATA.replace("_converted", "/final").replace("checkpoint_2", "checkpoint_3")
    assert run(line, *SHORT, *TOKENS) == 0
    one, two = weights(second), weights(place / "new_pretrained_checkpoint_3")
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = AutoModelForCausalLM.from_pretrained(second / "final")
    assert model.config.architectures == ["GPTNeoXForCausalLM"]
    is_used("new_pretrained_checkpoint_2", monkeypatch, capsys)


def test_a_run_without_a_step_is_refused(place, capsys):
    """LitGPT's own batch of 512 samples: a million tokens are no step there, unsaid."""
    folder_of_texts(place / "custom_pretraining_data")
    run("litgpt download EleutherAI/pythia-160m")
    line = CONTINUED.replace("1_000_000", "20_000")
    capsys.readouterr()
    assert run(line, *SHORT, "--train.global_batch_size", "512") == 2
    said = capsys.readouterr().err
    assert "there would be no optimizer step" in said
    # The command that is printed is one that runs.
    corrected = said.split("Try:\n")[1].strip()
    assert run(corrected.replace("gristmill", "litgpt", 1)) == 0


def test_weights_to_start_from_are_said(place, capsys):
    """`--resume auto` without a run to go on with starts afresh, and says from which weights."""
    folder_of_texts(place / "custom_pretraining_data")
    run("litgpt download EleutherAI/pythia-160m --tokenizer_only true")
    assert run(RESUMED, *SHORT, "--train.max_tokens", "4_000") == 0
    said = capsys.readouterr()
    assert "random at the start" in said.out + said.err


def test_prepared_data_by_its_path(place):
    """`--data LitData --data.path`."""
    folder_of_texts(place / "custom_pretraining_data")
    run("litgpt download EleutherAI/pythia-14m --tokenizer_only true")
    words = "prepare textfiles --input_dir custom_pretraining_data --val_fraction 0.1"
    made = ["--output_dir", "path/to/your/data", "--tokenizer_dir", "EleutherAI/pythia-14m"]
    assert main([*words.split(), *made]) == 0
    line = "litgpt pretrain pythia-14m --data LitData --data.path path/to/your/data"
    assert run(line, *SHORT, "--train.max_steps", "3", "--out_dir", "out/lit") == 0
    assert (place / "out/lit/final/tokenizer.json").is_file()


def test_the_configuration_of_a_run_is_its_own_model_s(place):
    """LitGPT copies the `config.json` of whoever gave the tokenizer."""
    folder_of_texts(place / "custom_pretraining_data")
    assert run("litgpt download EleutherAI/pythia-160m") == 0
    donor = place / "checkpoints/EleutherAI/pythia-160m"
    shutil.copytree(donor, place / "donor")
    line = CONTINUED.replace("--tokenizer_dir EleutherAI/pythia-160m", "--tokenizer_dir donor")
    line = line.replace("--initial_checkpoint_dir EleutherAI/pythia-160m", "")
    line = line.replace("pythia-160m", "tiny-llama-1.1b")
    short = ("--train.max_steps", "2", "--train.max_seq_length", "64")
    assert run(line, *SHORT, *short) == 0
    out = place / "new_pretrained_checkpoint/final"
    assert json.loads((donor / "config.json").read_text())["model_type"] == "gpt_neox"
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert (
        zoo.get("tiny-llama-1.1b").hidden_size
        == AutoModelForCausalLM.from_pretrained(out).config.hidden_size
    )

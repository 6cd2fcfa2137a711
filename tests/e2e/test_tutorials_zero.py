"""The tutorial *Zero to Pretraining, Finetuning, and Using LLMs with LitGPT*, all commands."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import yaml
from small import metrics
from tutorial_world import SHORT, is_used, run

from gristmill.formats.model_dir import open_model_dir

pytestmark = pytest.mark.slow

LORA = """litgpt finetune lora \\
  --config config_hub/finetune/phi-2/lora.yaml \\
  --train.max_steps 5"""
ADDRESS = "https://raw.githubusercontent.com/Lightning-AI/litgpt/main/"
LORA_BY_ADDRESS = LORA.replace("config_hub", f"{ADDRESS}config_hub")


def test_the_lists(place, capsys):
    assert run("litgpt pretrain") == 0
    names = capsys.readouterr().out.splitlines()
    assert names[0] == "Camel-Platypus2-13B"
    assert "tiny-llama-1.1b" in names
    assert run("litgpt download") == 0
    known = capsys.readouterr().out.splitlines()
    assert {"google/gemma-2b", "meta-llama/Llama-2-7b-hf", "microsoft/phi-2"} <= set(known)
    piped = subprocess.run(
        f"{sys.executable} -m gristmill download | grep  TinyLlama",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert piped.stdout.splitlines() == [name for name in known if "TinyLlama" in name]
    assert "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T" in piped.stdout
    assert not piped.stderr


@pytest.mark.parametrize("command", ["pretrain", "finetune lora"])
def test_the_help(place, capsys, command):
    with pytest.raises(SystemExit) as left:
        run(f"litgpt {command} --help")
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "--train.max_steps" in said
    assert "--config" in said


def test_pretraining_with_a_corpus_by_its_name(place, monkeypatch, capsys):
    line = """litgpt download \\
   --repo_id TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T \\
   --tokenizer_only true"""
    assert run(line) == 0
    folder = place / "checkpoints/TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.safetensors"))
    line = """litgpt pretrain \\
  --model_name tiny-llama-1.1b \\
  --data OpenWebText \\
  --tokenizer_dir checkpoints/TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"""
    capsys.readouterr()
    short = ("--train.max_steps", "3", "--train.max_seq_length", "64", "--out_dir", "out/owt")
    assert run(line, *SHORT, *short) == 0
    assert "fetching it once (gristmill download Skylion007/openwebtext" in capsys.readouterr().err
    assert [r["step"] for r in metrics(place / "out/owt") if "loss" in r] == [1, 2, 3]
    is_used("out/owt", monkeypatch, capsys)


def test_a_downloaded_model_talks(place, monkeypatch, capsys):
    assert run("litgpt download --repo_id microsoft/phi-2") == 0
    found = {path.name for path in (place / "checkpoints/microsoft/phi-2").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= found
    assert "lit_model.pth" not in found  # nothing is converted, and nothing is there twice
    monkeypatch.setattr("sys.stdin", io.StringIO("Why are LLMs so useful?    \n\n"))
    capsys.readouterr()
    line = "litgpt chat --checkpoint_dir checkpoints/microsoft/phi-2"
    assert run(line, "--max_new_tokens", "5") == 0
    said = capsys.readouterr()
    assert said.out.startswith(
        "Now chatting with phi-2.\nTo exit, press 'Enter' on an empty prompt."
    )
    assert ">> Prompt: " in said.out
    assert ">> Reply: " in said.out
    assert "Time for inference: " in said.err
    assert "tokens/sec" in said.err


@pytest.mark.parametrize("line", [LORA, LORA_BY_ADDRESS], ids=["path", "address"])
def test_finetuning_with_a_configuration_of_the_hub(place, line, monkeypatch, capsys):
    # As the tutorial has it: the model is downloaded first.
    assert run(line) == 2
    assert "gristmill download microsoft/phi-2" in capsys.readouterr().err
    assert run("litgpt download --repo_id microsoft/phi-2") == 0
    assert run(line, *SHORT) == 0
    out = place / "out/finetune/lora-phi-2"
    made = yaml.safe_load((out / "run.yaml").read_text())
    assert made["length"]["total_steps"] == 5
    assert made["length"]["warmup_steps"] < 5  # the file's 10 are for its own length
    assert made["settings"]["lora_r"] == 8
    assert made["length"]["global_batch_size"] == 8
    assert [r["step"] for r in metrics(out) if "loss" in r] == [1, 2, 3, 4, 5]
    assert json.loads((out / "final/config.json").read_text())["model_type"] == "phi"
    before = open_model_dir("microsoft/phi-2").parameters()
    after = open_model_dir(out).parameters()
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    if line == LORA:
        is_used("out/finetune/lora-phi-2", monkeypatch, capsys)

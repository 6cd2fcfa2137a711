"""`gristmill finetune lora` and `adapter` from records to what others load, and `merge`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from small import MODEL, WORDS, train_tokenizer, write_novels

from gristmill.cli import main
from gristmill.config.model import ModelConfig
from gristmill.formats import hf
from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
MATRICES = ("lora_key", "lora_projection", "lora_mlp", "lora_head")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model with its tokenizer, and records that are easy to learn."""
    root = tmp_path_factory.mktemp("finetune")
    tokenizer = train_tokenizer(write_novels(root / "novels"), root / "tokenizer")
    config = ModelConfig(**{**MODEL, "max_seq_length": 256, "num_layers": 3})
    model = Decoder(config)
    init_weights(model, 0)
    hf.write(root / "base", config, model.state_dict(), tokenizer_dir=tokenizer)
    rng = random.Random(0)
    records = [
        {"instruction": f"Say {word} {number}.", "input": "", "output": f"{word} it is."}
        for number, word in enumerate(rng.choices(WORDS, k=80))
    ]
    (root / "records.json").write_text(json.dumps(records))
    return root


def finetune(world: Path, kind: str, out: Path, *more: str) -> Path:
    command = [
        *("finetune", kind, str(world / "base"), "--out_dir", str(out), "--compile", "off"),
        *("--data", "JSON", "--data.json_path", str(world / "records.json")),
        *("--data.val_fraction", "0.2", "--train.global_batch_size", "8", "--device", "cpu"),
        *("--train.max_steps", "6", "--train.save_interval", "3", "--eval.interval", "6"),
        *("--optimizer.lr", "0.02", "--train.lr_warmup_steps", "0", "--precision", "32-true"),
        *("--train.schedule", "constant", "--data.prompt_style", "default"),
        *more,
    ]
    assert main(command) == 0
    return out


def held_out(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["val_loss"] for row in rows if "val_loss" in row]


def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def loaded_there(base: Path, adapter: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def tuned(world, request) -> Path:
    matrices = [word for name in MATRICES for word in (f"--{name}", "true")]
    dora = ["--lora_dora", str(request.param).lower(), "--eval.initial_validation", "true"]
    return finetune(world, "lora", world / f"run-{request.param}", *matrices, *dora)


@torch.no_grad()
def test_all_forms_of_an_adapter_are_the_same_model(world, tuned, tmp_path, capsys):
    """Merged at the end, by PEFT, by `merge`, and as the checkpoint that it came from."""
    losses = held_out(tuned)
    assert losses[-1] < losses[0] - 0.3
    expected = load_model(tuned / "final")(tokens())
    assert (expected - load_model(world / "base")(tokens())).abs().max() > 0.1
    close(loaded_there(world / "base", tuned / "final" / "adapter")(tokens()).logits, expected)
    close(load_model(tuned / "final" / "adapter")(tokens()), expected)
    close(load_model(tuned / "step-00000006")(tokens()), expected)
    there = transformers.AutoModelForCausalLM.from_pretrained(tuned / "final")
    close(there(tokens()).logits, expected)
    assert main(["merge", str(tuned / "step-00000006"), str(tmp_path / "merged")]) == 0
    close(load_model(tmp_path / "merged")(tokens()), expected)
    assert main(["merge_lora", str(tuned / "final")]) == 0
    assert "merged already" in capsys.readouterr().out


def test_checkpoints_hold_the_adapter_alone(tuned):
    size = sum(f.stat().st_size for f in (tuned / "step-00000006" / "weights").iterdir())
    assert size < 0.6 * (tuned / "final" / "model.safetensors").stat().st_size
    assert (tuned / "final" / "adapter" / "tokenizer.json").is_file()


def test_a_run_in_two_parts_is_bitwise_one(world, tmp_path):
    options = ("--lora_mlp", "true")
    whole = finetune(world, "lora", tmp_path / "whole", *options)
    parts = finetune(world, "lora", tmp_path / "parts", *options, "--train.max_steps", "3")
    finetune(world, "lora", tmp_path / "parts", *options)
    one, other = (open_model_dir(run / "final").parameters() for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def prompted(world) -> Path:
    options = ("--adapter_start_layer", "1", "--optimizer.lr", "0.1")
    return finetune(world, "adapter", world / "prompts", *options)


@torch.no_grad()
def test_adaption_prompts_are_the_same_model_there(world, prompted, capsys):
    expected = load_model(prompted / "final")(tokens())
    assert (expected - load_model(world / "base")(tokens())).abs().max() > 0.01
    close(load_model(prompted / "step-00000006")(tokens()), expected)
    there = loaded_there(world / "base", prompted / "final")
    close(there(tokens()).logits, expected)
    capsys.readouterr()
    words = ["--max_new_tokens", "4", "--prompt", "Say mill", "--temperature", "0"]
    assert main(["generate", str(prompted / "final"), *words]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["export", str(prompted / "final"), str(prompted / "hf")]) == 2
    assert "no part of any matrix" in capsys.readouterr().err

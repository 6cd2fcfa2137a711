"""`finetune full` through the command line: what comes of it, interruptions, several devices."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import small
import torch

from gristmill.cli import main


def write_records(folder: Path, count: int = 60) -> Path:
    """Instructions to repeat a word, as records and as chats."""
    records = []
    for number in range(count):
        word = small.WORDS[number % len(small.WORDS)]
        again = small.WORDS[(number * 7 + 3) % len(small.WORDS)]
        records.append({"instruction": f"say {word} and {again}", "input": "", "output": again})
        if number % 3 == 0:
            turns = [("user", f"say {word}"), ("assistant", word), ("user", again)]
            chat = [{"role": role, "content": text} for role, text in turns]
            records.append({"messages": [*chat, {"role": "assistant", "content": again}]})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return folder / "records.jsonl"


def command(world: Path, records: Path, out: Path, *more: str) -> list[str]:
    """The finetune command of the small world: 12 steps, saved every 4."""
    return [
        *("finetune", "full", str(world / "run"), "--out_dir", str(out)),
        *("--data", "JSON", "--data.json_path", str(records), "--data.prompt_style", "default"),
        *("--data.val_fraction", "0.1", "--train.max_steps", "12", "--train.save_interval", "4"),
        *("--eval.interval", "6", "--optimizer.lr", "0.003", "--compile", "off"),
        *("--precision", "32-true", "--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("tuned")
    records = write_records(root)
    assert main(command(world, records, root / "run")) == 0
    return root


def losses(out, key="val_loss"):
    return [row[key] for row in small.metrics(out) if key in row]


def test_the_held_out_loss_falls(tuned):
    held_out = losses(tuned / "run")
    assert held_out[-1] < 0.9 * held_out[0]
    assert [row["step"] for row in small.metrics(tuned / "run") if "loss" in row] == [*range(1, 13)]


def test_transformers_loads_the_model_and_prompts_it_as_it_was_trained(tuned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = tuned / "run/final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    turns = [{"role": "user", "content": "say rye"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("say rye")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.isfinite(model(ids).logits).all()
    newest = tuned / "run/step-00000012/tokenizer/chat_template.jinja"
    assert newest.read_text() == (final / "chat_template.jinja").read_text()


def test_packing_changes_nothing_that_is_learned(world, tuned, tmp_path):
    records = tuned / "records.jsonl"
    padded = ("--train.packing", "false", "--train.micro_batch_size", "4")
    assert main(command(world, records, tmp_path / "run", *padded)) == 0
    assert losses(tmp_path / "run", "loss") == pytest.approx(
        losses(tuned / "run", "loss"), rel=1e-4
    )
    assert losses(tmp_path / "run", "tokens") == losses(tuned / "run", "tokens")


def leave_at_step_5(run, stats):
    """A hook: the signal that a cluster sends."""
    if run.state.step == 5:
        os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_and_gone_on_it_ends_with_the_same_bits(world, tuned, tmp_path, capsys):
    records, out = tuned / "records.jsonl", tmp_path / "run"
    hook = ("--hook", f"{__name__}:leave_at_step_5")
    assert main(command(world, records, out, *hook)) == 128 + signal.SIGTERM
    assert not (out / "final").exists()
    assert main(command(world, records, out)) == 0
    assert "going on after step 5" in capsys.readouterr().out
    assert small.final_weights(out) == small.final_weights(tuned / "run")
    assert losses(out, "loss") == losses(tuned / "run", "loss")
    assert main(command(world, records, out)) == 0
    assert "is finished" in capsys.readouterr().out


def test_other_records_are_another_run(world, tuned, tmp_path, capsys):
    other = write_records(tmp_path, 50)
    assert main(command(world, other, tuned / "run")) == 2
    assert "holds another run: data: " in capsys.readouterr().err


@pytest.mark.slow
def test_two_devices_learn_what_one_learns(world, tuned, tmp_path):
    records = tuned / "records.jsonl"
    assert main(command(world, records, tmp_path / "run", "--devices", "2")) == 0
    assert losses(tmp_path / "run", "loss") == pytest.approx(
        losses(tuned / "run", "loss"), rel=1e-4
    )
    assert losses(tmp_path / "run")[-1] == pytest.approx(losses(tuned / "run")[-1], rel=1e-4)

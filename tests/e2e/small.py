"""A small world for end-to-end tests: novels made of words, a tokenizer, a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

from gristmill.cli import main

TEXT = """
the mill turned and water ran under a grey stone wheel while old Anna counted sacks of rye
for every farmer who came down from hills before night fell over village roofs again
"""
WORDS = TEXT.split()

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 384,
    "max_seq_length": 64,
}


def write_novels(folder: Path, files: int = 12, words: int = 700) -> Path:
    """Text files of pseudo-English, the same every time."""
    folder.mkdir(parents=True)
    for number in range(files):
        rng = random.Random(number)
        text = " ".join(rng.choice(WORDS) for _ in range(words))
        (folder / f"novel-{number:02}.txt").write_text(text.capitalize() + ".\n")
    return folder


def train_tokenizer(text: Path, out: Path) -> Path:
    """A byte-level tokenizer of 300 tokens."""
    code = main(["tokenizer", "train", str(text), "--vocab_size", "300", "--out_dir", str(out)])
    assert code == 0
    return out


def pretrain(root: Path, out: Path, *more: str) -> list[str]:
    """The pretrain command of the small world: 20 steps, saved every 4, validated every 5."""
    text, tokenizer = root / "novels", root / "tokenizer"
    model = [f"--model_config.{name}={value}" for name, value in MODEL.items()]
    return [
        "pretrain",
        *model,
        *("--data", "TextFiles", "--data.train_data_path", str(text), "--data.val_fraction", "0.1"),
        *("--tokenizer_dir", str(tokenizer), "--out_dir", str(out), "--compile", "off"),
        *("--train.max_steps", "20", "--train.global_batch_size", "4"),
        *("--train.micro_batch_size", "4", "--train.save_interval", "4", "--eval.interval", "5"),
        *("--eval.max_iters", "3", "--precision", "32-true", "--device", "cpu"),
        *more,
    ]


def metrics(out: Path) -> list[dict[str, float]]:
    """Every row of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def final_weights(out: Path) -> bytes:
    """The bytes of a finished model's weights."""
    return (out / "final/model.safetensors").read_bytes()

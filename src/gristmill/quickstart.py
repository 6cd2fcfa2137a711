"""Real text that is on every machine to a small model: the ordinary commands, one after another.

The text is the source of the running Python's standard library, without tests and installed
packages. Every stage can be interrupted; the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from gristmill.cli import main
from gristmill.config.commands import Quickstart
from gristmill.util.errors import UserError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders that are not taken: tests, installed packages and compiled files."""

PROMPTS = ("def read_file(path):\n", "class Stack:\n    def __init__(self")


def quickstart(cfg: Quickstart) -> None:
    """Run every stage from text to a model that writes, showing each command."""
    root = Path(cfg.out_dir)
    text, tokenizer, data, run = (str(root / n) for n in ("text", "tokenizer", "data", "run"))
    collect(root / "text")
    pattern = ("--pattern", "**/*.py")
    size = ("--vocab_size", "2048")
    _run("tokenizer", "train", text, *pattern, *size, "--out_dir", tokenizer)
    split = ("--val_fraction", "0.02", "--max_reject_fraction", "0.02")
    where = ("--tokenizer_dir", tokenizer, "--output_dir", data)
    _run("prepare", "textfiles", "--input_dir", text, *pattern, *split, *where)
    train = ["pretrain", "gristmill-nano", "--data", "LitData", "--data.data_path", data]
    train += ["--out_dir", run, "--train.global_batch_size", "8", "--train.lr_warmup_steps", "30"]
    train += [
        "--devices",
        "1",
        "--train.min_lr",
        "0",
        "--optimizer.lr",
        "0.004",
        "--eval.interval",
        "250",
    ]
    _run(*train, "--train.max_tokens", "3_000_000")
    for prompt in PROMPTS:
        _run("generate", run, "--prompt", prompt, "--max_new_tokens", "120")
    _summary(root, train)


def collect(target: Path) -> None:
    """Copy the standard library's sources to `target`, once, keeping their folders."""
    source = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        p for p in source.rglob("*.py") if not LEFT_OUT & set(p.relative_to(source).parts)
    )
    if not files:
        raise UserError(
            f"no Python sources in {source}: this Python comes without them. "
            "Use your own text: gristmill pretrain --help"
        )
    for path in files:
        copy = target / path.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_suffix(".partial")
            shutil.copyfile(path, partial)
            partial.replace(copy)
    size = sum(path.stat().st_size for path in files)
    print(f"Text: {len(files):,} files, {size / 1e6:.1f} MB of Python from {source}, in {target}")


def _run(*words: str) -> None:
    """Show a gristmill command as a person would type it, and run it."""
    print(f"\n$ {shlex.join(['gristmill', *words])}", flush=True)
    code = main(words)
    if code:
        sys.exit(code)


def _summary(root: Path, train: list[str]) -> None:
    rows = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    checks = [row for row in rows if "val_loss" in row]
    first, last = checks[0], checks[-1]
    print(
        f"\nValidation loss {first['val_loss']:.2f} -> {last['val_loss']:.2f} nats per token, "
        f"{first['val_bits_per_byte']:.2f} -> {last['val_bits_per_byte']:.2f} bits per byte, "
        f"after {last['tokens']:,} tokens.\n"
        f"The model is in {root}/run/final and loads in transformers as it is. Go on with:\n"
        f"  {shlex.join(['gristmill', 'chat', str(root / 'run')])}\n"
        f"  {shlex.join(['gristmill', *train, '--train.max_tokens', '10_000_000'])}\n"
        "  gristmill pretrain gristmill-nano --data TextFiles --data.train_data_path YOUR_FOLDER "
        f"--tokenizer_dir {shlex.quote(str(root / 'tokenizer'))}"
    )

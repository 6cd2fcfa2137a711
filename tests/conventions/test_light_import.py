"""Help and lists come without torch: what config/, util/ and the tables import is light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "tokenizers", "sentencepiece", "pyarrow", "jinja2"}
LIGHT = ("gristmill.util", "gristmill.config", "gristmill.models.zoo")

RUN = """
import importlib, json, sys
code = 0
try:
    {body}
except SystemExit as leave:
    code = leave.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def _loaded(body: str) -> tuple[int, set[str], str]:
    """Exit code, heavy packages imported, and standard output of `body` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(body=body)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code or 0, HEAVY & set(modules), done.stdout


def test_light_modules_import_nothing_heavy(package):
    names = [s.module for s in package if f"{s.module}.".startswith(tuple(n + "." for n in LIGHT))]
    assert len(names) > 5
    _, heavy, _ = _loaded(f"[importlib.import_module(n) for n in {names}]")
    assert not heavy


@pytest.mark.parametrize(
    ("argv", "shows"),
    [
        (["--help"], "pretrain"),
        (["pretrain", "--help"], "--train.max_tokens"),
        (["pretrain", "list"], "pythia-14m"),
        (["pretrain", "list", "--verbose"], "32/4"),
        (["pretrain"], "pythia-14m"),
        (["pretrain", "--data.help", "TextFiles"], "train_data_path"),
        (["prepare", "--help"], "--input_dir"),
        (["generate", "--help"], "--max_new_tokens"),
        (["serve", "--help"], "--queue_size"),
        (["download"], "EleutherAI/pythia-14m"),
        (["export", "--help"], "--max_shard_size"),
    ],
    ids=" ".join,
)
def test_help_and_lists_import_nothing_heavy(argv, shows):
    code, heavy, out = _loaded(f"from gristmill.cli import main; code = main({argv}) or 0")
    assert code == 0
    assert shows in out
    assert not heavy


def test_heavy_imports_are_seen():
    assert _loaded("import jinja2")[1] == {"jinja2"}

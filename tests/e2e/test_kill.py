"""SIGKILL anywhere: the same commands, run again, end with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import final_weights, main, metrics, pretrain

pytestmark = pytest.mark.slow

POINTS = [
    "gristmill.data.prepare:build",
    "gristmill.data.preparation.finalize:_placed",
    "gristmill.data.preparation.workspace:_rename_new",
    "gristmill.train.directory:write",
    "gristmill.train.fit:train_step",
    "gristmill.train.fit:validate",
    "gristmill.checkpoint.save:write_tensors",
    "gristmill.checkpoint.store:write_record",
    "gristmill.checkpoint.store:remove",
    "gristmill.formats.hf:write_file",
]
"""Functions at whose n-th call the process dies: preparation, step, validation, save, the end."""

RUNNER = """
import importlib, os, signal, sys
import torch
torch.set_num_threads(1)
from gristmill.cli import main
target, nth = sys.argv[1], int(sys.argv[2])
if target != "-":
    module, _, name = target.partition(":")
    module = importlib.import_module(module)
    real, calls = getattr(module, name), []
    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, deadly)
sys.exit(main(sys.argv[3:]))
"""


def start(words, target="-", nth=1):
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, target, str(nth), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(out: Path, world: Path) -> None:
    assert final_weights(out) == final_weights(world / "run")
    assert [row["step"] for row in metrics(out)] == list(range(21))


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(point, nth, world, tmp_path):
    out = tmp_path / "run"
    words = pretrain(world, out, "--data.cache_dir", str(tmp_path / "cache"))
    victim = start(words, point, nth)
    output = victim.communicate(timeout=120)[0]
    if victim.returncode == 0 and nth > 1:
        pytest.skip(f"{point} is called once")
    assert victim.returncode == -signal.SIGKILL, output
    assert main(words) == 0
    check(out, world)


def test_killed_at_ten_random_moments(world, tmp_path):
    out = tmp_path / "run"
    words = pretrain(world, out, "--data.cache_dir", str(tmp_path / "cache"))
    began = time.monotonic()
    assert start(pretrain(world, tmp_path / "whole")).wait(timeout=120) == 0
    whole_s = time.monotonic() - began
    rng, kills = random.Random(0), 0
    for _ in range(60):
        process = start(words)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * whole_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if process.returncode == 0:
            if kills >= 10:
                break
            # Finished too early: go on with another run of the same settings.
            check(out, world)
            out = tmp_path / f"run-{kills}"
            words = pretrain(world, out, "--data.cache_dir", str(tmp_path / "cache"))
    assert kills >= 10
    assert main(words) == 0
    check(out, world)

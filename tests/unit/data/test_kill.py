"""Preparation killed with SIGKILL at random moments: the rerun gives the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gristmill.data import workspace

from .conftest import make_text, tree

SCRIPT = """
import sys
from gristmill.config.commands import Prepare
from gristmill.data import plan
from gristmill.data.prepare import prepare

plan._MIN_UNIT_BYTES = 150_000
prepare(Prepare(layout="textfiles", input_dir=sys.argv[1], output_dir=sys.argv[2],
                tokenizer_dir=sys.argv[3], num_workers=int(sys.argv[4]), engine="tokenizers",
                val_fraction=0.1, chunk_tokens=20_000))
"""


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number:02}.txt").write_text(make_text(number, 15_000))
    return folder


@pytest.fixture
def start(corpus, tokenizer_dir, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def run(out, workers):
        command = [sys.executable, script, corpus, out, tokenizer_dir, workers]
        return subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    return run


def finished(process):
    assert process.wait(timeout=120) == 0


def workers_of(process):
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_killed_drivers_and_workers(start, tmp_path):
    finished(start(tmp_path / "calm", 1))
    calm = tree(tmp_path / "calm")
    chosen = random.Random(1)
    out, kills, interrupted = tmp_path / "out", 0, False
    for round_number in range(100):
        process = start(out, chosen.choice([1, 2, 3]))
        children = []
        deadline = time.monotonic() + chosen.uniform(0.4, 2.0)
        while time.monotonic() < deadline and process.poll() is None:
            children = workers_of(process) or children
            time.sleep(0.01)
        if process.poll() is not None:
            break
        interrupted |= (out / workspace.NAME / "units").is_dir()
        if round_number % 3 == 2 and children:
            victim = chosen.choice(children)
            if victim.is_running():
                victim.kill()
                kills += 1
            finished(process)  # another worker takes its unit
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "workers outlived their driver"
        assert not (out / "train" / "manifest.json").exists()
    if process.returncode != 0:
        finished(start(out, 2))
    assert kills >= 3
    assert interrupted
    assert tree(out) == calm


@pytest.mark.slow
def test_interrupt_ends_all_processes_and_keeps_the_work(start, tmp_path):
    out = tmp_path / "out"
    process = start(out, 2)
    units = out / workspace.NAME / "units"
    while not (units.is_dir() and os.listdir(units)):
        assert process.poll() is None
        time.sleep(0.01)
    children = workers_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) != 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert os.listdir(units)
    assert not (out / workspace.NAME / "tmp").exists()
    finished(start(out, 2))
    finished(start(tmp_path / "calm", 1))
    assert tree(out) == tree(tmp_path / "calm")


@pytest.mark.slow
def test_two_at_once_do_the_work_once(start, tmp_path):
    both = [start(tmp_path / "out", 1), start(tmp_path / "out", 2)]
    for process in both:
        finished(process)
    finished(start(tmp_path / "calm", 1))
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")

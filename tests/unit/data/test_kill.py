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

from gristmill.data.preparation import workspace

from .conftest import make_text, tree

SCRIPT = """
import sys
from gristmill.config.commands import Prepare
from gristmill.data.preparation import plan
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
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(make_text(number, 25_000))
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


def num_done(out):
    units = out / workspace.NAME / "units"
    return len(os.listdir(units)) if units.is_dir() else 0


def until_one_more_is_done(process, out):
    """Wait until another unit is committed; the worker processes then."""
    before = num_done(out)
    while num_done(out) <= before:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    return psutil.Process(process.pid).children()


@pytest.mark.slow
def test_killed_drivers_and_workers(start, tmp_path):
    finished(start(tmp_path / "calm", 1))
    chosen = random.Random(1)
    out = tmp_path / "out"
    for workers in (2, 1, 3, 2):
        process = start(out, workers)
        children = until_one_more_is_done(process, out)
        time.sleep(chosen.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "workers outlived their driver"
        assert not (out / "train" / "manifest.json").exists()
    process = start(out, 2)
    for worker in until_one_more_is_done(process, out):
        worker.kill()
    finished(process)  # other workers took their units
    assert tree(out) == tree(tmp_path / "calm")


@pytest.mark.slow
def test_killed_before_the_first_unit_is_done(start, tmp_path):
    finished(start(tmp_path / "calm", 1))
    for number, seconds in enumerate((0.2, 0.5, 0.8)):
        process = start(tmp_path / "out", 1 + number)
        time.sleep(seconds)
        process.kill()
        process.wait()
    finished(start(tmp_path / "out", 2))
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_all_processes_and_keep_the_work(number, start, tmp_path):
    out = tmp_path / "out"
    process = start(out, 2)
    units = out / workspace.NAME / "units"
    children = until_one_more_is_done(process, out)
    process.send_signal(number)
    assert process.wait(timeout=10) != -number, "it did not end in good order"
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

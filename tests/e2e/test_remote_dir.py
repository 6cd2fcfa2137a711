"""A run with a copy on an object store, gone on from on a machine that has nothing of it."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from small import final_weights, metrics, pretrain

from gristmill.cli import main
from gristmill.data.storage import Storage

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from data.s3 import bucket, s3_server  # noqa: F401

STOPS = ("--hook", "remote_stop:at_12")


@pytest.fixture(autouse=True)
def stopping_hook(tmp_path, monkeypatch):
    """A module whose hook ends the run after step 12, as a preemption does."""
    folder = tmp_path / "hooks"
    folder.mkdir()
    (folder / "remote_stop.py").write_text(
        "import os, signal\n\n\ndef at_12(run, stats):\n"
        "    if run.state.step == 12:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.syspath_prepend(folder)


def test_another_machine_goes_on(world, tmp_path, bucket, capsys):  # noqa: F811
    first, second = tmp_path / "first", tmp_path / "second"
    url = f"{bucket}/runs/small"
    assert main(pretrain(world, first, "--remote_dir", url, *STOPS)) == 128 + signal.SIGTERM
    there = {entry.name for entry in Storage(url).list()}
    assert {"run.yaml", "metrics.jsonl", "step-00000012/checkpoint.json"} <= there
    assert not any(name.startswith("final/") for name in there)
    shutil.copytree(first, tmp_path / "old")
    shutil.rmtree(first)  # the machine is gone

    assert main(pretrain(world, second, "--remote_dir", url)) == 0
    assert "bringing step-00000012" in capsys.readouterr().out
    assert final_weights(second) == final_weights(world / "run")
    steps = [[row["step"] for row in metrics(out)] for out in (second, world / "run")]
    assert steps[0] == steps[1]
    assert Storage(url).read("final/model.safetensors") == final_weights(second)

    # The first comes back with an older disk: it goes on behind the other.
    assert main(pretrain(world, tmp_path / "old", "--remote_dir", url)) == 0
    assert "bringing step-00000020" in capsys.readouterr().out
    assert final_weights(tmp_path / "old") == final_weights(second)


def test_wrong_uses(world, tmp_path, capsys):
    out, url = tmp_path / "run", tmp_path / "copy"
    words = pretrain(world, out, "--remote_dir", str(url), "--train.max_steps", "4")
    assert main(words) == 0
    capsys.readouterr()
    other = pretrain(world, tmp_path / "other", "--remote_dir", str(url), "--seed", "7")
    assert main(other) == 2
    assert "already holds another run: seed" in capsys.readouterr().err
    unnamed = [word for word in words if word not in ("--out_dir", str(out))]
    assert main(unnamed) == 2
    assert "--out_dir out/" in capsys.readouterr().err
    as_url = [word if word != str(out) else "s3://bucket/run" for word in unnamed]
    assert main([*as_url, "--out_dir", "s3://bucket/run"]) == 2
    assert "--remote_dir s3://bucket/run" in capsys.readouterr().err
    # What the store lost is copied again by the command of the finished run.
    shutil.rmtree(url / "step-00000004")
    assert main(words) == 0
    record = json.loads((url / "step-00000004" / "checkpoint.json").read_text())
    assert record["step"] == 4

"""Ranks of an array: who does what, and who makes the dataset."""

from __future__ import annotations

import json
import os
import threading

import pytest

from gristmill.config.commands import Prepare
from gristmill.data import prepare
from gristmill.data.preparation.executors import local
from gristmill.data.preparation.executors.array import Array, mine, place
from gristmill.data.preparation.workspace import Workspace
from gristmill.data.storage import Storage
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.engines import EngineChoice
from gristmill.util.errors import UserError

from .conftest import tree


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (2, 3),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (2, 3),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_PROCID": "3",
                "SLURM_NTASKS": "4",
            },
            (7, 8),
        ),
    ],
)
def test_the_place_in_an_array_is_told_by_the_scheduler(env, expected):
    assert place("auto", "auto", env) == expected


def test_kubernetes_tells_the_rank_only():
    env = {"JOB_COMPLETION_INDEX": "3"}
    assert place("auto", 8, env) == (3, 8)
    with pytest.raises(UserError, match="--world cannot be told"):
        place("auto", "auto", env)
    with pytest.raises(UserError, match="--rank and --world cannot be told"):
        place("auto", "auto", {})
    with pytest.raises(UserError, match="--rank 3 is not in a --world of 3"):
        place("auto", 3, env)


def test_no_more_processes_than_the_scheduler_gave_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_CPU_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert local.available_cores({}) == 64
    assert local.available_cores({"SLURM_CPUS_PER_TASK": "8"}) == 8
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert local.available_cores({}) == 4
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert local.available_cores({}) == 64


def test_units_are_dealt_out_once_whatever_is_done():
    units = [0, 2, 3, 5, 6, 7, 11]
    dealt = [mine(units, Array(rank, 3, 1)) for rank in range(3)]
    assert sorted(sum(dealt, [])) == units
    assert mine([u for u in units if u != 3], Array(0, 3, 1)) == [0, 6]


@pytest.fixture
def array(run_prepare, novels, small_units):
    def run(out, rank, world, **options):
        place = {"executor": "array", "rank": rank, "world": world, "val_fraction": 0.1}
        return run_prepare("textfiles", novels, out, **place | options)

    return run


def test_the_last_rank_completes_the_dataset(array, run_prepare, novels, tmp_path, capsys):
    calm = tree(run_prepare("textfiles", novels, tmp_path / "calm", val_fraction=0.1))
    out = tmp_path / "out"
    capsys.readouterr()
    for rank in (2, 0):
        array(out, rank, 3)
        told = capsys.readouterr().out
        assert f"rank {rank} has done its share" in told
        assert not (out / "train" / "manifest.json").exists()
    array(out, 1, 3)
    assert "Next:" in capsys.readouterr().out
    assert tree(out) == calm
    array(out, 0, 3)
    assert "is finished already" in capsys.readouterr().out


def test_a_lost_rank_is_made_up_for_by_any_other_world(array, run_prepare, novels, tmp_path):
    out = tmp_path / "out"
    array(out, 0, 3)
    array(out, 0, 1)
    calm = run_prepare("textfiles", novels, tmp_path / "calm", val_fraction=0.1)
    assert tree(out) == tree(calm)


def test_ranks_at_the_same_time(array, run_prepare, novels, tmp_path):
    out, errors = tmp_path / "out", []

    def rank(number):
        try:
            array(out, number, 3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    calm = run_prepare("textfiles", novels, tmp_path / "calm", val_fraction=0.1)
    assert tree(out) == tree(calm)


def test_another_job_is_not_touched(array, tmp_path):
    out = tmp_path / "out"
    array(out, 0, 2)
    before = tree(out)
    with pytest.raises(UserError, match="unfinished work of another job"):
        array(out, 1, 2, seed=3)
    assert tree(out) == before


def test_the_first_ranks_engine_counts(array, tmp_path, monkeypatch):
    out = tmp_path / "out"
    array(out, 0, 2)
    other = EngineChoice("fastokens", "0.0", "passed")
    monkeypatch.setattr(prepare, "choose_engine", lambda *args: other)
    array(out, 1, 2)
    assert Dataset.open(out / "train").manifest.tokenizer.engine.startswith("tokenizers ")


def test_a_rank_without_the_jobs_engine_says_so(array, tmp_path):
    out = tmp_path / "out"
    array(out, 0, 2)
    job = out / ".prepare" / "job.json"
    value = json.loads(job.read_text())
    value["engine"] |= {"version": "0.0", "parity": "passed"}
    job.write_text(json.dumps(value))
    with pytest.raises(UserError, match="the job was planned with tokenizers"):
        array(out, 1, 2)


def test_status_tells_what_is_left(array, tmp_path, capsys):
    out = tmp_path / "out"
    array(out, 0, 3)
    capsys.readouterr()
    prepare.prepare(Prepare(layout="status", output_dir=str(out)))
    told = capsys.readouterr().out
    stored = Workspace.open(Storage(out)).stored()
    done = len(range(0, stored["units"], 3))
    assert f"{done} of {stored['units']} parts done" in told

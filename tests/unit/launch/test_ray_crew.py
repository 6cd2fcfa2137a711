"""Which workers are asked of a Ray cluster, and how the end of a run is told."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict

import pytest

from gristmill.config.commands import Pretrain, RayWorkers
from gristmill.config.data import TextFiles
from gristmill.config.sections import Parallel
from gristmill.launch import ray as launcher
from gristmill.launch.elsewhere import settle_elsewhere
from gristmill.launch.ray import ENDED, SETTINGS, SETTINGS_AGAIN, Crew, crew_of, raise_ending
from gristmill.launch.start import train
from gristmill.util.errors import Interrupted, RunError, UserError
from gristmill.util.reports import Report

HEAD, CPUS, GPUS = {"CPU": 4.0}, {"CPU": 32.0}, {"CPU": 96.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "settings", "crew"),
    [
        ([HEAD, GPUS, GPUS], {"num_nodes": 2}, Crew("cuda", 8, 16, 16, 12.0)),
        ([HEAD, GPUS], {"devices": 2}, Crew("cuda", 2, 2, 2, 48.0)),
        ([HEAD, CPUS, CPUS], {"num_nodes": 2}, Crew("cpu", 1, 2, 2, 32.0)),
        ([HEAD, CPUS], {"num_nodes": 2}, Crew("cpu", 1, 2, 2, 4.0)),
        ([HEAD, GPUS], {"device": "cpu", "devices": 4}, Crew("cpu", 4, 4, 4, 24.0)),
        ([], {"num_nodes": 3, "device": "cuda", "devices": 8}, Crew("cuda", 8, 24, 24, 1.0)),
        (
            [CPUS],
            {"num_nodes": 4, "ray": RayWorkers(min_nodes=2, num_cpus=0.5), "devices": 2},
            Crew("cpu", 2, 8, 4, 0.5),
        ),
    ],
)
def test_workers_of_a_cluster(nodes, settings, crew):
    assert crew_of(Pretrain(**settings), nodes) == crew


def test_a_worker_takes_a_gpu_and_its_share_of_the_cpus():
    assert Crew("cuda", 8, 16, 16, 12.0).resources == {"CPU": 12.0, "GPU": 1.0}
    assert Crew("cpu", 1, 2, 2, 4.0).resources == {"CPU": 4.0}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "mps"}, "--launcher local"),
        ({"num_nodes": 0}, "--num_nodes 0"),
        ({"ray": RayWorkers(num_cpus=0)}, "--ray.num_cpus 0"),
        ({"ray": RayWorkers(min_nodes=3), "num_nodes": 2}, "--ray.min_nodes 3 is not between"),
        (
            {"ray": RayWorkers(min_nodes=1), "num_nodes": 2, "parallel": Parallel(tensor=2)},
            "--parallel fixes it",
        ),
        ({"launcher": "local", "ray": RayWorkers(address="local")}, "add --launcher ray"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        train(Pretrain(**{"launcher": "ray", **settings}))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--launcher ray needs Ray.*\[ray\]") as caught:
        train(Pretrain(launcher="ray"))
    assert caught.value.fix == {"--launcher": "local"}


def test_text_at_a_url_needs_a_shared_folder_for_what_it_is_prepared_into():
    data = TextFiles(train_data_path="s3://corpus/text")
    with pytest.raises(UserError, match="--data.cache_dir"):
        settle_elsewhere(Pretrain(data=data, num_nodes=2), "cpu")


def test_devices_below_one_are_refused():
    with pytest.raises(UserError, match="--devices 0"):
        crew_of(Pretrain(devices=0), [CPUS])


def test_too_small_a_cluster_is_told_about(capsys):
    crew = Crew("cuda", 8, 16, 16, 12.0)
    launcher._say_if_too_few(crew, [HEAD, GPUS])
    said = capsys.readouterr().err
    assert "room for 8 of 16 workers, which take 12 CPU and 1 GPU each" in said
    launcher._say_if_too_few(crew, [HEAD, GPUS, GPUS])
    assert not capsys.readouterr().err


def leave(folder, report):
    content = {"rank": 1, "world": 2, "report": asdict(report)}
    (folder / ENDED).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("report", "kind", "says"),
    [
        (Report("user", "a mistake", {"--a": 1}), UserError, "a mistake"),
        (Report("run", "the disk is full"), RunError, "the disk is full"),
        (Report("interrupted", "saved", signal=15), Interrupted, "saved"),
    ],
)
def test_what_a_rank_says_last_is_how_the_command_ends(tmp_path, report, kind, says):
    leave(tmp_path, report)
    with pytest.raises(kind, match=says):
        raise_ending(tmp_path, RuntimeError("of Ray's own"), [])


def test_other_endings(tmp_path):
    raise_ending(tmp_path, None, [])
    with pytest.raises(Interrupted):
        raise_ending(tmp_path, RuntimeError("it went"), [signal.SIGTERM])
    failure = RuntimeError("many lines")
    failure.worker_failures = {1: RuntimeError("a trace\nRuntimeError: worker 1 of 2 was killed")}
    with pytest.raises(RunError, match=r"worker 1 of 2 was killed\).*goes on"):
        raise_ending(tmp_path, failure, [])


def test_a_later_attempt_goes_on_with_what_the_first_has_begun(tmp_path):
    record = tmp_path / "run.yaml"
    order = {"folder": str(tmp_path / "ray"), "record": str(record), "before": None}
    (tmp_path / "ray").mkdir()
    first, second = (launcher._meet(order, "127.0.0.1") for _ in range(2))
    assert (first["attempt"], second["attempt"]) == (0, 1)
    assert first["settings"] == second["settings"] == str(tmp_path / "ray" / SETTINGS)
    record.touch()
    assert launcher._meet(order, "127.0.0.1")["settings"] == str(tmp_path / "ray" / SETTINGS_AGAIN)


def test_endings_that_another_attempt_may_better_are_raised_for_ray(tmp_path):
    with pytest.raises(RuntimeError, match="worker 1 of 2 was killed by SIGKILL"):
        launcher._end(tmp_path, tmp_path, 1, 2, -9)
    said = Report("failed", "no neighbour")
    (tmp_path / "report-1.json").write_text(json.dumps(asdict(said)))
    with pytest.raises(RuntimeError, match="no neighbour"):
        launcher._end(tmp_path, tmp_path, 1, 2, 70)
    said = Report("user", "a mistake")
    (tmp_path / "report-0.json").write_text(json.dumps(asdict(said)))
    launcher._end(tmp_path, tmp_path, 0, 2, 2)
    with pytest.raises(UserError, match="a mistake"):
        raise_ending(tmp_path, None, [])

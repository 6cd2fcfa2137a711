"""Units on a Ray cluster: what is done about lost workers and nodes, and clear refusals.

The cluster is stood in for by `FakeRay`; kills on a real one are in tests/e2e/test_prepare_kill.py.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gristmill.config.commands import RayCluster
from gristmill.data.preparation.executors import Failure, Task
from gristmill.data.preparation.executors import ray as cluster
from gristmill.data.preparation.executors import work as work_module
from gristmill.data.preparation.units import Progress
from gristmill.data.preparation.workspace import NAME
from gristmill.data.raw.documents import DataError
from gristmill.util.errors import RunError, UserError

from .conftest import tree

TASK = Task("/out", "/in")
HERE = f"unit 4 on {socket.gethostname()}"


class RayError(Exception):
    """The errors of Ray, by the names that it gives them."""


class WorkerCrashedError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class NodeDiedError(RayError):
    pass


class LocalRayletDiedError(RayError):
    pass


class FakeRay:
    """Tasks are run when they are waited for. `script[unit]` lists how its attempts end.

    An error is raised in place of an answer; anything else is the function's own messages.
    """

    exceptions = SimpleNamespace(
        RayError=RayError,
        WorkerCrashedError=WorkerCrashedError,
        OutOfMemoryError=OutOfMemoryError,
        NodeDiedError=NodeDiedError,
        LocalRayletDiedError=LocalRayletDiedError,
    )

    def __init__(self, script=(), cpus=2.0):
        self.script = {unit: list(ends) for unit, ends in dict(script).items()}
        self.cpus = cpus
        self.begun = []
        self.running = self.most_running = 0
        self.cancelled = []

    def remote(self, num_cpus, max_retries):
        assert max_retries == 0  # Ray must not count for us
        assert num_cpus > 0
        return lambda function: SimpleNamespace(remote=self._start)

    def _start(self, task, job, unit):
        assert task == TASK
        self.begun.append(unit)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        ends = self.script.get(unit)
        return self._answers(unit, ends.pop(0) if ends else None)

    def _answers(self, unit, end):
        yield {"progress": vars(Progress(text_bytes=5))}
        self.running -= 1
        if end is None:
            yield {"progress": vars(Progress(text_bytes=10, committed=True))}
        else:
            yield end

    def get(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, tasks, num_returns, timeout):
        return tasks, []

    def cancel(self, task, force):
        self.cancelled.append(task)

    def cluster_resources(self):
        return {"CPU": self.cpus}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}]


def fly(ray, units, settings=None):
    """(failures, last progress of each unit)."""
    seen = {}
    failures = cluster._Flight(ray, TASK, settings or RayCluster(), seen.__setitem__).run(units)
    return failures, seen


def test_all_units_are_run_once_and_reported():
    ray = FakeRay()
    failures, seen = fly(ray, range(20))
    assert failures == []
    assert sorted(ray.begun) == list(range(20))
    assert all(seen[unit].committed and seen[unit].text_bytes == 10 for unit in range(20))


@pytest.mark.parametrize(
    ("cpus", "settings", "most"),
    [
        (3.0, RayCluster(), 6),
        (3.0, RayCluster(num_cpus=0.5), 12),
        (0.0, RayCluster(), 2),  # nodes may still come
        (64.0, RayCluster(max_in_flight=5), 5),
    ],
)
def test_units_in_flight_are_bounded(cpus, settings, most):
    ray = FakeRay(cpus=cpus)
    fly(ray, range(40), settings)
    assert ray.most_running == most


@pytest.mark.parametrize("error", [WorkerCrashedError("it crashed"), OutOfMemoryError("too much")])
def test_a_unit_that_kills_its_workers_is_left_out_and_others_go_on(error):
    ray = FakeRay({3: [error] * 3, 4: [error] * 2})
    failures, seen = fly(ray, range(8))
    assert [failure.unit for failure in failures] == [3]
    assert "died 3 times" in failures[0].message
    assert str(error) in failures[0].message
    assert not seen[3].committed
    assert all(seen[unit].committed for unit in range(8) if unit != 3)
    assert ray.begun.count(3) == ray.begun.count(4) == 3


def test_lost_nodes_do_not_count_as_deaths_of_a_unit():
    lost = [NodeDiedError("gone")] * 9
    ray = FakeRay({0: lost, 1: [*lost, LocalRayletDiedError("gone")]})
    failures, seen = fly(ray, range(3))
    assert failures == [Failure(1, "the node it ran on was lost 10 times")]
    assert seen[0].committed


def test_bad_input_fails_its_unit_only():
    ray = FakeRay({1: [{"failed": "a.parquet is truncated"}]})
    failures, seen = fly(ray, range(4))
    assert failures == [Failure(1, "a.parquet is truncated")]
    assert ray.begun.count(1) == 1
    assert seen[3].committed


def test_errors_of_the_job_end_it_with_their_fix_and_cancel_the_rest():
    wrong = {"error": "UserError", "text": "no such field", "fix": [{"--text_field": "content"}]}
    ray = FakeRay({1: [wrong]})
    with pytest.raises(UserError, match="no such field") as caught:
        fly(ray, range(50))
    assert caught.value.fix == {"--text_field": "content"}
    assert len(ray.begun) < 50
    assert ray.cancelled


def test_storage_that_comes_back_is_waited_for(monkeypatch):
    slept = []
    clock = SimpleNamespace(
        now=0.0,
        monotonic=lambda: clock.now,
        monotonic_ns=lambda: 0,
        sleep=lambda seconds: (slept.append(seconds), setattr(clock, "now", clock.now + seconds)),
    )
    monkeypatch.setattr(cluster, "time", clock)
    again = {"again": "cannot write in s3://bucket"}
    failures, seen = fly(FakeRay({0: [again] * 2}), [0])
    assert failures == []
    assert seen[0].committed
    assert clock.now > 25  # later each time
    with pytest.raises(RunError, match="cannot write in s3://bucket"):
        fly(FakeRay({0: [again] * 3}), [0])


def test_a_cluster_without_the_package_is_named():
    ray = FakeRay({0: [RayError("trouble\nNo module named 'gristmill'")]})
    with pytest.raises(RunError, match="No module named 'gristmill'.* same version"):
        fly(ray, [0])


def test_units_that_fit_no_node_are_told_about(capsys):
    fly(FakeRay(cpus=2.0), [0], RayCluster(num_cpus=8, max_in_flight=1))
    assert "no node of the cluster has 8 CPUs" in capsys.readouterr().err
    fly(FakeRay(cpus=8.0), [0], RayCluster(num_cpus=8))
    assert capsys.readouterr().err == ""


class FakeWork:
    """`Work` that raises `error`, or reports."""

    error: Exception | None = None
    loaded = 0

    def __init__(self, task):
        FakeWork.loaded += 1

    def run(self, unit, report):
        if self.error is not None:
            raise self.error
        report(Progress(tokens=1))
        report(Progress(tokens=7, committed=True))


@pytest.fixture
def fake_work(monkeypatch):
    monkeypatch.setattr(work_module, "Work", FakeWork)
    monkeypatch.setattr(FakeWork, "loaded", 0)
    monkeypatch.setattr(cluster, "_works", {})
    return FakeWork


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (DataError("bad file", "a.txt"), {"failed": "bad file"}),
        (
            UserError("wrong", {"--a": 1}),
            {"error": "UserError", "text": "wrong", "fix": [{"--a": 1}]},
        ),
        (RunError("broken"), {"error": "RunError", "text": "broken", "fix": []}),
        (
            caused(RunError("full"), OSError(28, "no space")),
            {"error": "RunError", "text": "full", "fix": []},
        ),
        (caused(RunError("reset"), ConnectionResetError(104, "")), {"again": "reset"}),
        (
            KeyError("x"),
            {"error": "RunError", "text": f"KeyError while preparing {HERE}: 'x'.", "fix": []},
        ),
        (queue.Empty("x"), {"again": f"Empty while preparing {HERE}: x."}),
        (MemoryError(), {"again": f"MemoryError while preparing {HERE}: ."}),
    ],
)
def test_how_a_unit_ends_is_told_in_plain_values(fake_work, monkeypatch, error, answer):
    monkeypatch.setattr(FakeWork, "error", error)
    assert list(cluster._serve(TASK, "job", 4)) == [answer]


def test_a_worker_loads_a_job_once_and_the_next_job_anew(fake_work):
    for unit in range(3):
        *_, last = cluster._serve(TASK, "job", unit)
        assert last == {"progress": vars(Progress(tokens=7, committed=True))}
    assert fake_work.loaded == 1
    list(cluster._serve(TASK, "next job in the same folder", 0))
    assert fake_work.loaded == 2


def test_a_folder_that_a_node_does_not_see_is_named(tmp_path):
    messages = queue.SimpleQueue()
    cluster._run(Task(str(tmp_path / "none"), "/in"), "job", 0, messages)
    message = messages.get()
    assert message["error"] == "UserError"
    assert str(tmp_path / "none") in message["text"]
    assert "s3://bucket/folder" in message["text"]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"\[ray\]") as caught:
        cluster.run(TASK, [0], RayCluster(), lambda *_: None)
    assert caught.value.fix == {"--executor": "local"}


COMMAND = """
import sys
from gristmill.cli import main
from gristmill.data.preparation import plan

plan._MIN_UNIT_BYTES, plan._UNITS_WANTED = 8000, 1000
sys.exit(main(["prepare", "textfiles", *sys.argv[1:]]))
"""
POISON = """
import os

def kept(texts):
    if any("poison" in text for text in texts) and not os.path.exists({cure!r}):
        os._exit(7)
    return [True] * len(texts)
"""


@pytest.mark.slow
def test_a_unit_that_kills_workers_of_a_real_cluster(novels, tokenizer_dir, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "poisoned.py").write_text(POISON.format(cure=str(tmp_path / "cure")))
    name = "b/c/10.txt"
    (novels / name).write_text("poison " + (novels / name).read_text())

    def prepare(out, *options):
        command = [
            *(sys.executable, tmp_path / "command.py", "--input_dir", novels),
            *("--output_dir", tmp_path / out, "--tokenizer_dir", tokenizer_dir),
            *("--engine", "tokenizers", "--map", "poisoned:kept", *options),
        ]
        return subprocess.run(
            list(map(str, command)),
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    on_ray = ("--executor", "ray", "--ray.address", "local")
    done = prepare("out", *on_ray)
    assert done.returncode == 1
    assert "1 of " in done.stderr
    assert "died 3 times" in done.stderr
    assert name in done.stderr
    units = list((tmp_path / "out" / NAME / "units").iterdir())
    assert len(units) > 5
    (tmp_path / "cure").touch()
    done = prepare("out", *on_ray)
    assert done.returncode == 0, done.stderr
    assert f"{len(units)} of {len(units) + 1} parts are done" in done.stderr
    assert prepare("calm", "--num_workers", 1).returncode == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (RayCluster(num_cpus=0), "num_cpus 0"),
        (RayCluster(max_in_flight=0), "max_in_flight 0"),
        (RayCluster(address="ray://127.0.0.1:10001"), "ray job submit"),
        (RayCluster(address="somewhere"), "HOST:PORT"),
        (RayCluster(address=f"127.0.0.1:{closed_port()}"), "ray start --head"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, says):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=says):
        cluster.run(TASK, [0], settings, lambda *_: None)


def test_no_cluster_on_this_machine(monkeypatch):
    ray = pytest.importorskip("ray")

    def init(address, **_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="ray start --head") as caught:
        cluster.run(TASK, [0], RayCluster(), lambda *_: None)
    assert caught.value.fix == {"--ray.address": "local"}


def test_nothing_left_needs_no_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cluster.run(TASK, [], RayCluster(), lambda *_: None) == []

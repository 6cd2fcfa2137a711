"""`--launcher ray`: two Ray nodes on this machine train as two local devices do."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small import final_weights, metrics, pretrain

pytestmark = pytest.mark.slow

WAIT_S = 600

# A process of its own: tests refuse the connections to other addresses that Ray tries.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
print(cluster.address, flush=True)
added = []
for line in sys.stdin:
    if line == "add\\n":
        added.append(cluster.add_node(**node))
    else:
        cluster.remove_node(added.pop(), allow_graceful=False)
    print("0", flush=True)
cluster.shutdown()
"""

HOOKS = '''
import os, signal, time
from pathlib import Path

def once(run, rank, step, what):
    if run.mesh.rank != rank or run.state.step != step:
        return False
    try:
        (run.job.out_dir / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def kill(run, stats):
    """Ray's worker that watches over rank 1 is killed, and this rank with it."""
    if once(run, 1, 10, "killed"):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

def wait(run, stats):
    """Until the test has sent its signal."""
    if once(run, 0, 6, "waits"):
        while not (run.job.out_dir / "goes-on").exists():
            time.sleep(0.1)

def wait_at_6_and_10(run, stats):
    """Until the test has taken a machine away, and given one back."""
    for step in (6, 10):
        if once(run, 0, step, f"at-{step}"):
            while not (run.job.out_dir / f"after-{step}").exists():
                time.sleep(0.1)
'''


class Nodes:
    """A Ray cluster of this machine that can grow and shrink."""

    def __init__(self, folder: Path) -> None:
        (folder / "cluster.py").write_text(CLUSTER)
        self._log = (folder / "cluster.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, folder / "cluster.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.address = self._answer()

    def _answer(self) -> str:
        while line := self._process.stdout.readline():
            if line[0].isdigit():
                return line.strip()
        raise AssertionError("the cluster did not start")

    def add(self) -> None:
        self._do("add")

    def remove(self) -> None:
        """The one that was added last is lost with all that runs on it."""
        self._do("remove")

    def _do(self, what: str) -> None:
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._answer()

    def stop(self) -> None:
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    pytest.importorskip("ray.train")
    nodes = Nodes(tmp_path_factory.mktemp("cluster"))
    yield nodes
    nodes.stop()


def start(root: Path, words: list[str]) -> subprocess.Popen[str]:
    (root / "hooks.py").write_text(HOOKS)
    return subprocess.Popen(
        [sys.executable, "-m", "gristmill", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(out: Path) -> list[psutil.Process]:
    """Processes of this run that are there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(out / "ray") in word for word in process.cmdline()):
                found.append(process)
    return found


def test_a_worker_that_is_killed_and_the_bits_of_local_devices(nodes, world, tmp_path):
    """From raw text, which the cluster prepares."""
    nodes.add()
    out = tmp_path / "run"
    shutil.copytree(world / "novels", tmp_path / "novels", ignore=lambda *_: [".gristmill"])
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    on_ray = ("--launcher", "ray", "--num_nodes", "2", "--ray.address", nodes.address)
    process = start(tmp_path, pretrain(tmp_path, out, *on_ray, "--hook", "hooks:kill"))
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    assert "preparing" in said
    assert (out / "killed").exists()
    assert "the workers were started again (restart 1)" in said
    assert [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, 21))
    assert not ranks_of(out)
    calm = start(tmp_path, pretrain(world, tmp_path / "calm", "--devices", "2"))
    assert calm.wait(timeout=WAIT_S) == 0
    assert final_weights(out) == final_weights(tmp_path / "calm")


def test_a_signal_is_obeyed(nodes, world, tmp_path):
    out = tmp_path / "run"
    on_ray = ("--launcher", "ray", "--ray.address", nodes.address)
    process = start(tmp_path, pretrain(world, out, *on_ray, "--hook", "hooks:wait"))
    deadline = time.monotonic() + WAIT_S
    while not (out / "waits").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    (out / "goes-on").touch()
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, said
    assert "SIGTERM: stopped at step 6, saved." in said
    assert (out / "step-00000006/checkpoint.json").exists()
    assert not ranks_of(out)


@pytest.fixture
def own_nodes(tmp_path: Path) -> Iterator[Nodes]:
    pytest.importorskip("ray.train")
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.stop()


def test_machines_leave_and_join(own_nodes, world, tmp_path):
    out = tmp_path / "run"
    own_nodes.add()
    on_ray = ("--launcher", "ray", "--num_nodes", "2", "--ray.min_nodes", "1")
    hook = ("--hook", "hooks:wait_at_6_and_10", "--ray.address", own_nodes.address)
    process = start(tmp_path, pretrain(world, out, *on_ray, *hook))

    def wait_for(there) -> None:
        deadline = time.monotonic() + WAIT_S
        while not there():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def worlds() -> list[int]:
        """How many ranks each attempt has had."""
        attempts = sorted(out.glob("ray/*/attempt-*"))
        return [len(list(attempt.glob("rank-*.log"))) for attempt in attempts]

    wait_for((out / "at-6").exists)
    assert worlds() == [2]
    assert len(ranks_of(out)) == 2
    own_nodes.remove()
    wait_for(lambda: len(ranks_of(out)) < 2)  # it goes with its machine, but not at once
    (out / "after-6").touch()
    wait_for((out / "at-10").exists)
    assert worlds() == [2, 1]
    own_nodes.add()
    wait_for(lambda: worlds() == [2, 1, 2])  # Ray looks once a minute
    (out / "after-10").touch()
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    rows, expected = metrics(out), metrics(world / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    losses = [row["loss"] for row in expected[1:]]
    assert [row["loss"] for row in rows[1:]] == pytest.approx(losses, rel=1e-5)
    assert not ranks_of(out)

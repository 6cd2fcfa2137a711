"""Preparation killed with SIGKILL at twenty random moments, on disk and on an object store.

Drivers, worker processes, ranks of an array, workers and nodes of a two-node Ray cluster are
killed; the same command, run again, finishes, and every byte is that of an undisturbed local run
with one worker.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from data.conftest import make_text, save_tokenizer, tree
from data.s3 import bucket, s3_server, stored, upload  # noqa: F401

from gristmill.data.preparation.workspace import Workspace
from gristmill.data.storage import Storage, is_url

pytestmark = pytest.mark.slow

SEED = 3
WAIT_S = 120

COMMAND = """
import sys
from gristmill.cli import main
from gristmill.data.preparation import plan

plan._MIN_UNIT_BYTES, plan._UNITS_WANTED = 25_000, 1000
sys.exit(main(["prepare", *sys.argv[1:]]))
"""

# A process of its own: tests refuse the connections to other addresses that Ray tries.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
print(cluster.address, flush=True)
for line in sys.stdin:
    added = cluster.add_node(**node)
    print(added.all_processes["raylet"][0].process.pid, flush=True)
cluster.shutdown()
"""


class RayNodes:
    """A Ray cluster of two nodes on this machine, one of which can be killed and replaced."""

    def __init__(self, folder: Path) -> None:
        script = folder / "cluster.py"
        script.write_text(CLUSTER)
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "cluster.log").open("w"),
            text=True,
        )
        self.address = self._answer()
        self._second: psutil.Process | None = None

    def _answer(self) -> str:
        while line := self._process.stdout.readline():
            if line[0].isdigit():
                return line.strip()
        raise AssertionError("the cluster did not start")

    def whole(self) -> None:
        """Start the second node if it is not there."""
        if self._second is None or not self._second.is_running():
            self._process.stdin.write("add\n")
            self._process.stdin.flush()
            self._second = psutil.Process(int(self._answer()))

    def workers(self) -> list[psutil.Process]:
        """The processes that run units on both nodes."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [p for p in children if _name(p).startswith("ray::_serve")]

    def kill_node(self) -> None:
        """End the second node's own process; Ray ends the rest of it."""
        self._second.kill()
        self._process.stdin.flush()

    def stop(self) -> None:
        """End all of it."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        for process in [psutil.Process(self._process.pid), *processes]:
            _kill(process)
        self._process.wait()


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory,
    s3_server: str,  # noqa: F811
) -> Iterator[RayNodes]:
    """Begun after the server: the nodes' environment has the keys."""
    pytest.importorskip("ray")
    nodes = RayNodes(tmp_path_factory.mktemp("cluster"))
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records in files of two kinds, some of them bad; fewer in `few`; and a tokenizer."""
    root = tmp_path_factory.mktemp("corpus")
    save_tokenizer(root / "tokenizer", bos="<s>", eos="</s>")
    write_records(root / "text", 40)
    write_records(root / "few", 14)
    return root


def write_records(folder: Path, each: int) -> None:
    folder.mkdir()
    for number in range(12):
        lines = [
            json.dumps({"text": make_text(100 * number + n, 20 + 37 * n % 1400)})
            for n in range(each)
        ]
        lines[number] = '{"text": 7}'
        data = "\n".join(lines).encode()
        if number % 4 == 3:
            (folder / f"{number:02}.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / f"{number:02}.jsonl").write_bytes(data)


class Job:
    """One preparation, begun, killed and begun again in many ways."""

    def __init__(self, folder: Path, tokenizer: Path, source: str, out: str) -> None:
        self.source, self.out, self._tokenizer = source, out, tokenizer
        self.log = folder / f"log-{is_url(out)}.txt"
        self._script = folder / "prepare.py"
        self._script.write_text(COMMAND)

    def start(self, *options: str) -> subprocess.Popen:
        command = [
            *("jsonl", "--input_dir", self.source, "--output_dir", self.out),
            *("--tokenizer_dir", str(self._tokenizer), "--engine", "tokenizers"),
            *("--val_fraction", "0.1", "--chunk_tokens", "6000", "--max_reject_fraction", "0.2"),
            *options,
        ]
        with self.log.open("a") as log:
            print(*options, file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, self._script, *command], stdout=log, stderr=log
            )

    def end(self, process: subprocess.Popen) -> None:
        """Wait for a good end."""
        assert process.wait(WAIT_S) == 0, self.log.read_text()[-3000:]

    def run(self, *options: str) -> None:
        self.end(self.start(*options))

    def made(self) -> dict[str, bytes]:
        """Every file that is there, and its bytes."""
        return stored(self.out) if is_url(self.out) else tree(Path(self.out))

    def num_done(self) -> int:
        return len(Workspace.open(Storage(self.out)).committed())

    def is_finished(self) -> bool:
        place = Storage(self.out)
        return all(place.exists(f"{name}/manifest.json") for name in ("train", "val"))

    def clear(self) -> None:
        Storage(self.out).remove("")


LOCAL = ("--num_workers", "2")


class Killer:
    """Kills at random moments between the start of a command and the end it usually has."""

    def __init__(self, job: Job, nodes: RayNodes | None) -> None:
        self.job, self.nodes = job, nodes
        self.random = random.Random(SEED)
        self.kills = 0
        self.seconds: dict[str, float] = {}

    def options(self, kind: str) -> tuple[str, ...]:
        if kind.startswith("ray"):
            self.nodes.whole()
            return ("--executor", "ray", "--ray.address", self.nodes.address)
        return LOCAL

    def calm(self, kind: str) -> dict[str, bytes]:
        """What a command makes that nobody disturbs; how long it takes is kept."""
        self.job.clear()
        options = self.options(kind)
        started = time.monotonic()
        self.job.run(*options)
        self.seconds[kind.split()[0]] = time.monotonic() - started
        return self.job.made()

    def killed(self, who: str) -> None:
        self.kills += 1
        print(f"kill {self.kills}: {who}, {self.job.num_done()} units committed")

    def wait(self, process: subprocess.Popen, kind: str) -> None:
        """Sleep for a random time; for every second kill, begun when one more unit is done."""
        seconds = self.seconds[kind.split()[0]]
        if self.kills % 2:
            before = self.job.num_done()
            while self.job.num_done() <= before and process.poll() is None:
                time.sleep(0.02)
            seconds /= 2
        time.sleep(self.random.uniform(0, seconds))

    def driver(self, kind: str) -> None:
        """Kill the command itself."""
        process = self.job.start(*self.options(kind))
        self.wait(process, kind)
        if process.poll() is None:
            process.kill()
            self.killed(f"{kind} driver")
        process.wait()

    def worker(self, kind: str) -> None:
        """Kill a process that runs a unit; the command goes on without it and ends well."""
        process = self.job.start(*self.options(kind))
        self.wait(process, kind)
        while process.poll() is None:
            if found := self._workers(process, kind):
                _kill(self.random.choice(found))
                self.killed(f"{kind} worker")
                break
            time.sleep(0.01)
        self.job.end(process)

    def _workers(self, process: subprocess.Popen, kind: str) -> list[psutil.Process]:
        if kind.startswith("ray"):
            return self.nodes.workers()
        try:
            children = psutil.Process(process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [p for p in children if "executors.local" in _name(p)]

    def rank(self, kind: str) -> None:
        """Kill one of the two ranks of an array, which is then run again."""
        one = ("--executor", "array", "--world", "2", "--num_workers", "1", "--rank")
        ranks = [self.job.start(*one, str(rank)) for rank in range(2)]
        self.wait(ranks[0], kind)
        chosen = self.random.randrange(2)
        if ranks[chosen].poll() is None:
            ranks[chosen].kill()
            self.killed(f"{kind} rank")
        self.job.end(ranks[1 - chosen])
        ranks[chosen].wait()
        self.job.run(*one, str(chosen))

    def node(self, kind: str) -> None:
        """Kill a node of the cluster; the command goes on with the other and ends well."""
        process = self.job.start(*self.options(kind))
        self.wait(process, kind)
        if process.poll() is None:
            self.nodes.kill_node()
            self.killed(f"{kind} node")
        self.job.end(process)


# Who is killed, and how often; twenty in all.
KILLS = {
    ("local", "driver"): 4,
    ("local", "worker"): 3,
    ("local array", "rank"): 4,
    ("ray", "driver"): 3,
    ("ray", "worker"): 3,
    ("ray", "node"): 3,
}


@pytest.fixture
def places(request: pytest.FixtureRequest, corpus: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """(folder with the text, the input, the output)"""
    if request.param == "folder":
        return corpus / "text", str(corpus / "text"), str(tmp_path / "out")
    # A server in Python is slow.
    url = request.getfixturevalue("bucket")
    return corpus / "few", upload(corpus / "few", f"{url}/text"), f"{url}/out"


@pytest.mark.parametrize("places", ["folder", "s3"], indirect=True)
def test_twenty_kills(places, corpus, nodes, tmp_path):
    folder, source, out = places
    tokenizer = corpus / "tokenizer"
    undisturbed = Job(tmp_path, tokenizer, str(folder), str(tmp_path / "calm"))
    undisturbed.run("--num_workers", "1")
    expected = undisturbed.made()
    assert len([name for name in expected if name.endswith(".bin")]) > 20

    killer = Killer(Job(tmp_path, tokenizer, source, out), nodes)
    for kind in ("local", "ray"):
        assert killer.calm(kind) == expected
        killer.job.clear()
    print(f"seed {SEED}, seconds undisturbed: {killer.seconds}")
    for (kind, who), times in KILLS.items():
        goal = killer.kills + times
        for _ in range(10 * times):
            getattr(killer, who)(kind)
            if killer.job.is_finished():
                if who == "driver":  # perhaps in the middle of tidying up
                    killer.job.run(*killer.options(kind))
                assert killer.job.made() == expected, (kind, who, killer.kills)
                killer.job.clear()
            if killer.kills == goal:
                break
        assert killer.kills == goal
        if who == "driver":
            killer.job.run(*LOCAL)  # any executor finishes another one's work
            assert killer.job.made() == expected, kind
            killer.job.clear()
    assert killer.kills == sum(KILLS.values()) == 20

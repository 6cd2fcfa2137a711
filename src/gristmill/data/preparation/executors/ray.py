"""A Ray cluster: plain tasks, a bounded number at a time; what they make is on storage only.

A task is one unit. It yields small dicts: how far it is, and how it ended. Nothing else goes
through Ray, so that a driver, a worker or a node can die at any moment: what is committed is kept.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gristmill.config.commands import RayCluster
from gristmill.data.preparation.executors import MAX_DEATHS, Failure, OnProgress, Task, death
from gristmill.data.preparation.units import Progress
from gristmill.data.raw.documents import DataError
from gristmill.tokenizer.engines import single_thread_env
from gristmill.util.errors import RunError, UserError
from gristmill.util.extras import install_command

if TYPE_CHECKING:
    from gristmill.data.preparation.executors.work import Work

# A node that is lost takes its units along, whatever they are: that says little about a unit.
_MAX_LOSSES = 10
_POLL_S = 0.2
_REPORT_INTERVAL_S = 1.0
_CONNECT_S = 10.0
# Units use files, not Ray's memory; this is the least that Ray takes.
_OBJECT_STORE_BYTES = 80 << 20
# Errors of storage that trying again does not mend.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}

_Message = dict[str, Any]


def run(
    task: Task, units: Sequence[int], settings: RayCluster, on_progress: OnProgress
) -> list[Failure]:
    """Run the units on a Ray cluster; those that could not be done.

    A unit with damaged input is a failure, and so is one whose worker died three times or that was
    on ten nodes that were lost. Raises what ends the whole job: UserError, also when there is no
    cluster, or RunError such as a full disk.
    """
    if settings.num_cpus <= 0 or (settings.max_in_flight != "auto" and settings.max_in_flight < 1):
        raise UserError(
            f"--ray.num_cpus {settings.num_cpus} and --ray.max_in_flight "
            f"{settings.max_in_flight} must be above 0. for example: --ray.num_cpus 1"
        )
    if not units:
        return []
    with connected(settings.address, "--executor") as ray:
        return _Flight(ray, task, settings, on_progress).run(units)


@contextlib.contextmanager
def connected(address: str, option: str) -> Iterator[Any]:
    """Ray, connected; a connection that the program had before is left as it is.

    `option` is the one that asked for Ray, to be named where there is none.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"{option} ray needs Ray, which is not installed. install it with "
            f"`{install_command('ray')}`, or use {option} local.",
            fix={option: "local"},
        ) from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    else:
        _check_reachable(_known(ray) if address == "auto" else address)
    # Its own way to end on SIGTERM would hide ours.
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    if main:
        signal.signal(signal.SIGTERM, before)
    try:
        yield ray
    finally:
        ray.shutdown()


def _known(ray: Any) -> str:
    """The cluster that Ray means by `auto`, which may be gone; empty when it is not noted."""
    with contextlib.suppress(Exception):  # no public way to ask
        noted = os.environ.get("RAY_ADDRESS") or ray._private.utils.read_ray_address()
        return noted if isinstance(noted, str) and noted != "auto" else ""
    return ""


def _check_reachable(address: str) -> None:
    """Raise UserError where nobody listens: Ray itself would try for minutes."""
    if not address:
        return
    if "://" in address:
        raise UserError(
            f"--ray.address {address} is a client's address. run the command on a machine of the "
            "cluster with --ray.address auto (for example through `ray job submit`).",
            fix={"--ray.address": "auto"},
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"--ray.address {address} is no address. give auto, local or HOST:PORT, "
            "for example 10.0.0.1:6379."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster can be reached at --ray.address {address} ({error}). start one with "
        "`ray start --head` and name its HOST:PORT, or use --ray.address local.",
        fix={"--ray.address": "local"},
    )


class _Flight:
    """The units that are on the cluster and those that wait, as the driver sees them."""

    def __init__(self, ray: Any, task: Task, settings: RayCluster, on_progress: OnProgress) -> None:
        self._ray, self._task, self._settings = ray, task, settings
        self._on_progress = on_progress
        # Retries are ours: Ray cannot tell a unit that kills its worker from a lost machine.
        self._remote = ray.remote(num_cpus=settings.num_cpus, max_retries=0)(_serve)
        # Workers outlive a job where the program was connected before: never another job's plan.
        self._job = f"{os.getpid()} {time.monotonic_ns()}"
        self._waiting: deque[int] = deque()
        self._held: list[tuple[float, int]] = []
        self._running: dict[Any, int] = {}
        self._deaths: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._failures: list[Failure] = []

    def run(self, units: Sequence[int]) -> list[Failure]:
        """Run all; those that could not be done."""
        self._waiting.extend(units)
        self._say_if_too_large()
        try:
            while self._waiting or self._running or self._held:
                self._launch()
                running = list(self._running)
                if not running:
                    time.sleep(_POLL_S)
                    continue
                ready, _ = self._ray.wait(running, num_returns=len(running), timeout=_POLL_S)
                for answers in ready:
                    self._listen(answers)
        finally:
            for answers in self._running:
                with contextlib.suppress(Exception):
                    self._ray.cancel(answers, force=True)
        return self._failures

    def _launch(self) -> None:
        now = time.monotonic()
        self._waiting.extend(unit for due, unit in self._held if due <= now)
        self._held = [(due, unit) for due, unit in self._held if due > now]
        most = self._most()
        while self._waiting and len(self._running) < most:
            unit = self._waiting.popleft()
            self._running[self._remote.remote(self._task, self._job, unit)] = unit

    def _most(self) -> int:
        """How many units may be on the cluster now: nodes come and go."""
        if self._settings.max_in_flight != "auto":
            return self._settings.max_in_flight
        cpus = self._ray.cluster_resources().get("CPU", 0)
        return max(2, int(2 * cpus / self._settings.num_cpus))

    def _say_if_too_large(self) -> None:
        nodes = self._ray.nodes()
        largest = max((n["Resources"].get("CPU", 0) for n in nodes if n["Alive"]), default=0)
        if largest < self._settings.num_cpus:
            print(
                f"no node of the cluster has {self._settings.num_cpus:g} CPUs (--ray.num_cpus); "
                f"the largest has {largest:g}. waiting for one that has.",
                file=sys.stderr,
            )

    def _listen(self, answers: Any) -> None:
        """Take the next answer of a task that has one."""
        unit = self._running[answers]
        try:
            message: _Message = self._ray.get(next(answers))
        except StopIteration:
            message = {"again": "its task ended without an answer"}
        except self._ray.exceptions.RayError as error:
            message = self._lost(unit, error)
        if "progress" in message:
            progress = Progress(**message["progress"])
            self._on_progress(unit, progress)
            if not progress.committed:
                return
        del self._running[answers]
        if "error" in message:
            kind = UserError if message["error"] == "UserError" else RunError
            raise kind(message["text"], *message["fix"])
        if "failed" in message:
            self._failures.append(Failure(unit, message["failed"]))
        if "again" in message:
            self._try_again(unit, message["again"])

    def _lost(self, unit: int, error: Exception) -> _Message:
        """What to do about a unit whose task did not end by itself."""
        known = self._ray.exceptions
        if isinstance(error, known.NodeDiedError | known.LocalRayletDiedError):
            self._losses[unit] += 1
            if self._losses[unit] >= _MAX_LOSSES:
                return {"failed": f"the node it ran on was lost {_MAX_LOSSES} times"}
            self._waiting.append(unit)
            return {}
        if isinstance(error, known.WorkerCrashedError | known.OutOfMemoryError):
            self._deaths[unit] += 1
            if self._deaths[unit] >= MAX_DEATHS:
                return {"failed": death(unit, str(error).strip().splitlines()[0]).message}
            self._waiting.append(unit)
            return {}
        text = str(error).strip().splitlines()[-1]
        return {
            "error": "RunError",
            "text": f"the cluster cannot run unit {unit} ({type(error).__name__}: {text}). install "
            "the same version of gristmill, Ray and Python on all of its nodes.",
            "fix": [],
        }

    def _try_again(self, unit: int, why: str) -> None:
        """Later, as storage and networks recover; a third failure ends the job."""
        self._deaths[unit] += 1
        if self._deaths[unit] >= MAX_DEATHS:
            raise RunError(why)
        self._held.append((time.monotonic() + 5.0 ** self._deaths[unit], unit))


_works: dict[tuple[Task, str], Work] = {}
"""What this worker process has loaded: the one job that it last worked for."""


def _serve(task: Task, job: str, unit: int) -> Iterator[_Message]:
    """Messages about a unit while it is run: the body of a Ray task."""
    # Read when the libraries first encode, in this process.
    os.environ.update(single_thread_env())
    messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
    threading.Thread(target=_run, args=(task, job, unit, messages), daemon=True).start()
    while True:
        message = messages.get()
        yield message
        if "progress" not in message or message["progress"]["committed"]:
            return


def _run(task: Task, job: str, unit: int, messages: queue.SimpleQueue[_Message]) -> None:
    """Run a unit and say how it ends, whatever happens."""
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.committed or time.monotonic() - last >= _REPORT_INTERVAL_S:
            last = time.monotonic()
            messages.put({"progress": vars(progress).copy()})

    try:
        _work(task, job).run(unit, report)
    except DataError as error:
        messages.put({"failed": str(error)})
    except UserError as error:
        messages.put({"error": "UserError", "text": str(error), "fix": [error.fix]})
    except RunError as error:
        messages.put(_ended(str(error), error.__cause__))
    except BaseException as error:
        where = f"unit {unit} on {socket.gethostname()}"
        messages.put(_ended(f"{type(error).__name__} while preparing {where}: {error}.", error))


def _ended(text: str, cause: BaseException | None) -> _Message:
    if _may_pass(cause):
        return {"again": text}
    return {"error": "RunError", "text": text, "fix": []}


def _work(task: Task, job: str) -> Work:
    """The job as this process has loaded it."""
    from gristmill.data.preparation.executors.work import Work

    if (task, job) not in _works:
        _works.clear()
        try:
            _works[task, job] = Work(task)
        except FileNotFoundError as error:
            raise UserError(
                f"{task.out} on {socket.gethostname()} has not what the command put there "
                f"({error}). all nodes of a cluster must see the same files: name a folder that "
                "they share, or a URL such as s3://bucket/folder."
            ) from error
    return _works[task, job]


def _may_pass(cause: BaseException | None) -> bool:
    """Whether an error may be gone in a moment: of storage, of a network's library, of memory."""
    if isinstance(cause, OSError):
        return cause.errno not in _LASTING
    # Libraries of object stores raise errors of their own; built-in ones are somebody's mistake.
    return isinstance(cause, MemoryError) or type(cause).__module__ != "builtins"

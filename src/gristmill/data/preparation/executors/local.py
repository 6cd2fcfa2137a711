"""Worker processes of this machine, one unit at a time each.

A worker is given the next unit whenever it is free. Workers read unit numbers from their standard
input and leave when it closes, so they never outlive the process that started them, however it
ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gristmill.data.preparation.executors import MAX_DEATHS, Failure, OnProgress, Task, death
from gristmill.data.preparation.units import Progress
from gristmill.data.raw.documents import DataError
from gristmill.tokenizer.engines import single_thread_env
from gristmill.util.errors import RunError, UserError

if TYPE_CHECKING:
    from gristmill.data.preparation.executors.work import Work

_REPORT_INTERVAL_S = 0.2
_CPU_SHARE = Path("/sys/fs/cgroup/cpu.max")
# The errors of a worker that are raised again here, by the name they are sent under.
_ERRORS = {error.__name__: error for error in (UserError, RunError)}

_Message = dict[str, Any] | None


def run(
    task: Task, units: Sequence[int], num_workers: int, on_progress: OnProgress
) -> list[Failure]:
    """Run the units in `num_workers` processes; those that could not be done.

    A unit with damaged input is a failure, and so is one whose worker died three times. Raises
    what ends the whole job: UserError, or RunError such as a full disk.
    """
    if not units:
        return []
    # Workers are killed without a chance to remove their scraps.
    with tempfile.TemporaryDirectory(prefix="gristmill-prepare-") as scraps:
        return _run_in_processes(task, units, num_workers, on_progress, scraps)


def _run_in_processes(
    task: Task, units: Sequence[int], num_workers: int, on_progress: OnProgress, scraps: str
) -> list[Failure]:
    waiting = deque(units)
    deaths: dict[int, int] = {}
    failures: list[Failure] = []
    messages: queue.SimpleQueue[tuple[_Worker, _Message]] = queue.SimpleQueue()
    workers: set[_Worker] = set()
    some_started = False
    try:
        while waiting or workers:
            while waiting and len(workers) < num_workers:
                workers.add(_Worker(task, waiting.popleft(), messages, scraps))
            worker, message = messages.get()
            some_started = some_started or message is not None
            if message is None:
                workers.discard(worker)
                gone = _after_death(worker, deaths, waiting)
                if gone and not some_started:
                    raise RunError(
                        f"no worker process can start (exit code {worker.process.poll()}; -9 often "
                        "means that memory ran out). what they say is above."
                    )
                failures += gone
            elif "ready" in message:
                pass
            elif "error" in message:
                raise _ERRORS.get(message["error"], RunError)(message["text"], *message["fix"])
            elif "failed" in message:
                failures.append(Failure(message["unit"], message["failed"]))
                worker.give(waiting.popleft() if waiting else None)
            else:
                progress = Progress(**message["progress"])
                on_progress(message["unit"], progress)
                if progress.committed:
                    worker.give(waiting.popleft() if waiting else None)
    finally:
        for worker in workers:
            worker.stop()
    return failures


def run_here(task: Task, units: Sequence[int], on_progress: OnProgress) -> list[Failure]:
    """Run the units one after another in this process; those that could not be done.

    Saves starting a process where there is little to do; what runs out of memory takes us along.
    """
    from gristmill.data.preparation.executors.work import Work

    work = Work(task)
    failures = []
    for unit in units:
        try:
            work.run(unit, partial(on_progress, unit))
        except DataError as error:
            failures.append(Failure(unit, str(error)))
    return failures


def available_cores(env: Mapping[str, str] = os.environ) -> int:
    """Processor cores that this process may use, by its mask, SLURM, or its container's share."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    given = env.get("SLURM_CPUS_PER_TASK", "")
    if given.isdecimal():
        cores = min(cores, int(given))
    # Kubernetes limits the time on all cores, not their number.
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CPU_SHARE.read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def _after_death(worker: _Worker, deaths: dict[int, int], waiting: deque[int]) -> list[Failure]:
    """Give a dead worker's unit to another one, or up."""
    unit = worker.unit
    if unit is None:
        return []
    deaths[unit] = deaths.get(unit, 0) + 1
    if deaths[unit] >= MAX_DEATHS:
        return [death(unit, f"exit code {worker.process.poll()}")]
    waiting.appendleft(unit)
    return []


class _Worker:
    """A worker process as its driver sees it. `unit` is what it has been given."""

    def __init__(
        self,
        task: Task,
        unit: int,
        messages: queue.SimpleQueue[tuple[_Worker, _Message]],
        scraps: str,
    ) -> None:
        # Its own session: Ctrl-C reaches the driver, which closes its workers in good order.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                **single_thread_env(),
                "OMP_NUM_THREADS": "1",
                "TMPDIR": scraps,
            },
            text=True,
            start_new_session=True,
        )
        self.unit: int | None = None
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()
        self.give(unit)

    def give(self, unit: int | None) -> None:
        """Give it the next unit, or none more."""
        self.unit = unit
        assert self.process.stdin is not None
        try:
            if unit is None:
                self.process.stdin.close()
            else:
                self.process.stdin.write(f"{unit}\n")
                self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the end of its messages says so

    def stop(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()

    def _listen(self, messages: queue.SimpleQueue[tuple[_Worker, _Message]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            messages.put((self, json.loads(line)))
        self.process.wait()
        messages.put((self, None))


def _serve(task: Task) -> None:
    """Be a worker: run the units named on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Messages get the real standard output; whatever prints must not mix with them.
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    units: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_read_units, args=(sys.stdin, units), daemon=True).start()
    try:
        from gristmill.data.preparation.executors.work import Work

        work = Work(task)
        _send(messages, ready=True)
        while True:
            _run_reporting(work, units.get(), messages)
    except UserError as error:
        _send(messages, error="UserError", text=str(error), fix=[error.fix])
    except RunError as error:
        _send(messages, error="RunError", text=str(error), fix=[])
    except Exception as error:
        text = f"{type(error).__name__} while preparing: {error}."
        _send(messages, error="RunError", text=text, fix=[])
        raise


def _send(messages: IO[str], **message: Any) -> None:
    print(json.dumps(message), file=messages)


def _read_units(source: IO[str], units: queue.SimpleQueue[int]) -> None:
    for line in source:
        units.put(int(line))
    # No more work, or the driver died, perhaps in the middle of a unit: leave at once.
    os._exit(0)


def _run_reporting(work: Work, unit: int, messages: IO[str]) -> None:
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.committed or time.monotonic() - last >= _REPORT_INTERVAL_S:
            last = time.monotonic()
            _send(messages, unit=unit, progress=vars(progress))

    try:
        work.run(unit, report)
    except DataError as error:
        _send(messages, unit=unit, failed=str(error))


if __name__ == "__main__":
    _serve(Task(**json.loads(sys.argv[1])))

"""Who runs the units: worker processes of this machine, one unit at a time each.

A worker is given the next unit whenever it is free. Which worker runs a unit cannot be seen in the
result. Workers read unit numbers from their standard input and leave when it closes, so they never
outlive the process that started them, however it ends.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from gristmill.data.units import Engine, Progress, run_unit
from gristmill.data.workspace import Workspace
from gristmill.tokenizer.engines import open_engine, single_thread_env
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

_MAX_DEATHS = 3
_REPORT_INTERVAL_S = 0.2
# The errors of a worker that are raised again here, by the name they are sent under.
_ERRORS = {error.__name__: error for error in (UserError, RunError)}

OnProgress = Callable[[int, Progress], None]


def run_here(space: Workspace, root: Path, units: Sequence[int], on_progress: OnProgress) -> None:
    """Run the units one after another in this process."""
    work = _Work(space, root)
    for unit in units:
        work.run(unit, partial(on_progress, unit))


def run_local(
    space: Workspace,
    root: Path,
    units: Sequence[int],
    num_workers: int,
    on_progress: OnProgress,
) -> None:
    """Run the units in `num_workers` processes.

    Raises what a unit raises. A unit whose worker dies is given to another one, three times at
    most, then RunError names it.
    """
    waiting = deque(units)
    deaths: dict[int, int] = {}
    messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
    workers: set[_Worker] = set()
    try:
        while waiting or workers:
            while waiting and len(workers) < num_workers:
                workers.add(_Worker(space, root, waiting.popleft(), messages))
            worker, message = messages.get()
            if message is None:
                workers.discard(worker)
                if worker.unit is not None:
                    _count_death(worker, deaths)
                    waiting.appendleft(worker.unit)
            elif "error" in message:
                raise _ERRORS.get(message["error"], RunError)(message["text"])
            else:
                progress = Progress(**message["progress"])
                on_progress(message["unit"], progress)
                if progress.committed:
                    worker.give(waiting.popleft() if waiting else None)
    finally:
        for worker in workers:
            worker.stop()


def _count_death(worker: _Worker, deaths: dict[int, int]) -> None:
    assert worker.unit is not None
    deaths[worker.unit] = deaths.get(worker.unit, 0) + 1
    if deaths[worker.unit] >= _MAX_DEATHS:
        raise RunError(
            f"the worker for unit {worker.unit} died {_MAX_DEATHS} times (exit code "
            f"{worker.process.poll()}; -9 often means that memory ran out). "
            "run the same command again with fewer --num_workers; what is done is kept."
        )


class _Worker:
    """A worker process as its driver sees it. `unit` is what it has been given."""

    def __init__(
        self,
        space: Workspace,
        root: Path,
        unit: int,
        messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]],
    ) -> None:
        # Its own session: Ctrl-C reaches the driver, which closes its workers in good order.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gristmill.data.executors", str(space.out), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **single_thread_env(), "OMP_NUM_THREADS": "1"},
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

    def _listen(self, messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            messages.put((self, json.loads(line)))
        self.process.wait()
        messages.put((self, None))


class _Work:
    """The job as one process needs it: plan, input and engine, loaded once."""

    def __init__(self, space: Workspace, root: Path) -> None:
        self._space, self._root = space, root
        self._plan, choice = space.load()
        self._engine: Engine = open_engine(Tokenizer.load(space.tokenizer_dir), choice)

    def run(self, unit: int, report: Callable[[Progress], None]) -> None:
        """Run one unit and commit it."""
        latest = Progress()

        def note(progress: Progress) -> None:
            nonlocal latest
            latest = progress
            report(progress)

        try:
            with self._space.writing(unit) as folder:
                run_unit(self._plan, unit, self._root, self._engine, folder, note)
            report(replace(latest, committed=True))
        except OSError as error:
            raise disk_error(error, self._space.out) from error


def disk_error(error: OSError, out: Path) -> RunError:
    """What to tell the user about a failed write below `out`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        status = os.statvfs(out)
        free = status.f_bavail * status.f_frsize
        return RunError(
            f"no space left for {out} ({free / 1e9:.2f} GB free). free some and run the same "
            "command again: what is done is kept."
        )
    return RunError(f"cannot write in {out} ({error}). run the same command again when it works.")


def _serve(out: Path, root: Path) -> None:
    """Be a worker: run the units named on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Messages get the real standard output; whatever prints must not mix with them.
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    units: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_read_units, args=(sys.stdin, units), daemon=True).start()
    try:
        work = _Work(Workspace(out), root)
        while True:
            _run_reporting(work, units.get(), messages)
    except (UserError, RunError) as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}), file=messages)
    except Exception as error:
        text = f"{type(error).__name__} while preparing: {error}."
        print(json.dumps({"error": RunError.__name__, "text": text}), file=messages)
        raise


def _read_units(source: IO[str], units: queue.SimpleQueue[int]) -> None:
    for line in source:
        units.put(int(line))
    # No more work, or the driver died, perhaps in the middle of a unit: leave at once.
    os._exit(0)


def _run_reporting(work: _Work, unit: int, messages: IO[str]) -> None:
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.committed or time.monotonic() - last >= _REPORT_INTERVAL_S:
            last = time.monotonic()
            print(json.dumps({"unit": unit, "progress": vars(progress)}), file=messages)

    work.run(unit, report)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))

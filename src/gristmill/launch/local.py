"""Several processes of one machine: started, watched, told of signals, and started again.

They meet in a file, so that nothing listens on a network, and each asks the kernel to end it when
this process ends. A launcher of torch's own (elastic) listens on all interfaces, leaves workers
alive when it is killed, and gives the peers of a dead one 30 seconds; here they go at once, and
the checkpoints on disk are what the next attempt starts from.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gristmill.parallel.mesh import RENDEZVOUS
from gristmill.util.errors import Interrupted, RunError
from gristmill.util.reports import FINAL, LAUNCHER, REPORTS, read_report

POLL_S = 0.1
LEAVE_S = 120.0
"""How long the others may take to leave after a signal, once one has."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAST_LINES = 15
"""Of a worker that died without a word and does not write to the terminal."""


def run_workers(command: Callable[[int], Sequence[str]], count: int, *, max_restarts: int) -> None:
    """Run `count` copies of a command to their end, as ranks 0 to count - 1 of one world.

    `command` gives it for an attempt, counted from 0. Where one is killed or fails for no reason of
    the user's, all are ended and started again, at most `max_restarts` times. Raises what a single
    process would: UserError for a mistake, RunError for a failure, Interrupted after a signal that
    the workers have obeyed.
    """
    for attempt in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="gristmill-") as meeting:
            workers = Workers(command(attempt), count, Path(meeting))
            failure = workers.wait()
        if failure is None:
            return
        if not failure.again or attempt == max_restarts:
            raise failure.error
        _say(f"{failure.what}; starting again ({attempt + 1} of {max_restarts})")


@dataclass(frozen=True)
class Failure:
    """How an attempt ended, in words, as an error, and whether another one may do better."""

    what: str
    error: Exception
    again: bool = False


class Workers:
    """The processes of one attempt. Rank 0 writes to the terminal, the others to files."""

    def __init__(self, command: Sequence[str], count: int, meeting: Path) -> None:
        self.signal: int | None = None
        self.meeting = meeting
        self.logs = [meeting / f"rank-{rank}.log" for rank in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended_here: set[int] = set()
        environment = _environment(count)
        environment |= {RENDEZVOUS: str(meeting / "store"), REPORTS: str(meeting)}
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with self.logs[rank].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=None if rank == 0 else log,
                        stderr=None if rank == 0 else log,
                        # Ctrl-C reaches them from here alone: twice would mean to leave at once.
                        start_new_session=True,
                    )
                )

    def wait(self) -> Failure | None:
        """What went wrong, once all have ended; when one fails the others are ended."""
        with self._forwarding():
            while True:
                codes = [process.poll() for process in self.processes]
                if all(code is not None for code in codes):
                    break
                if any(codes):
                    self._end()
                time.sleep(POLL_S)
        return self._judge([process.wait() for process in self.processes])

    def _end(self) -> None:
        """End those that are left: without a peer they would wait for it until a time-out.

        After a signal all are on their way out, and get time for it.
        """
        if self.signal is not None:
            deadline = time.monotonic() + LEAVE_S
            while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
                time.sleep(POLL_S)
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.ended_here.add(rank)
                process.kill()

    def _judge(self, codes: Sequence[int]) -> Failure | None:
        """What became of the workers; None where all ended well."""
        if not any(codes):
            return None
        own = [rank for rank, code in enumerate(codes) if code and rank not in self.ended_here]
        reports = {rank: read_report(self.meeting, rank) for rank in own}
        world = len(codes)
        for kind in FINAL:
            for rank, said in reports.items():
                if said is not None and said.kind == kind:
                    return Failure(said.message, said.error(rank, world))
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            return Failure(name, Interrupted(self.signal, f"{name}: stopped"))
        for rank in own:
            if codes[rank] < 0:
                how = f"was killed by {signal.Signals(-codes[rank]).name}"
                return self._died(rank, how, hint=codes[rank] == -signal.SIGKILL)
        for rank, said in reports.items():
            if said is not None:
                error = said.error(rank, world)
                what = said.message if said.kind == "stalled" else f"worker {rank}: {said.message}"
                return Failure(what, error, again=True)
        return self._died(own[0], f"ended with code {codes[own[0]]}")

    def _died(self, rank: int, how: str, hint: bool = False) -> Failure:
        """A worker that left no word."""
        what = f"worker {rank} of {len(self.processes)} {how}"
        if hint:
            what += " (by somebody, or by the system for want of memory)"
        written = "" if rank == 0 else self._tail(rank)
        message = f"{what}. The same command goes on from the newest checkpoint.{written}"
        return Failure(what + written, RunError(message), again=True)

    def _tail(self, rank: int) -> str:
        """The last lines that a worker wrote to its file."""
        lines = self.logs[rank].read_text(errors="replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-LAST_LINES:])

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Pass signals on to the workers; they decide what to save."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(number)

        earlier = {}
        if threading.current_thread() is threading.main_thread():
            for number in FORWARDED:
                if signal.getsignal(number) != signal.SIG_IGN:
                    earlier[number] = signal.signal(number, forward)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _environment(count: int) -> dict[str, str]:
    """What all workers of a machine are told."""
    environment = dict(os.environ)
    # Ranks share the cores; more threads than cores wait for each other.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // count)))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A module of the user's own is found where this process finds it.
    environment["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys(path or os.getcwd() for path in sys.path)
    )
    environment["WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"] = str(count)
    environment[LAUNCHER] = str(os.getpid())
    return environment


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(line: str) -> None:
    sys.stderr.write(f"gristmill: {line}\n")
    sys.stderr.flush()

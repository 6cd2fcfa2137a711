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
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from gristmill.launch.worker import FAILED, RENDEZVOUS
from gristmill.util.errors import Interrupted, RunError, UserError

POLL_S = 0.1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAST_LINES = 15
"""Of a worker that failed and does not write to the terminal."""


def run_workers(command: Sequence[str], count: int, *, max_restarts: int) -> None:
    """Run `count` copies of a command to their end, as ranks 0 to count - 1 of one world.

    Where one is killed or fails for no reason of the user's, all are ended and started again, at
    most `max_restarts` times. Raises what a single process would: UserError for a mistake,
    RunError for a failure, Interrupted after a signal that the workers have obeyed.
    """
    for attempt in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="gristmill-") as meeting:
            workers = Workers(command, count, Path(meeting))
            codes = workers.wait()
            failure = _judge(codes, workers)
            if failure is None:
                return
        if not failure.again or attempt == max_restarts:
            raise failure.error
        _say(f"{failure.what}; starting again ({attempt + 1} of {max_restarts})")


class Workers:
    """The processes of one attempt. Rank 0 writes to the terminal, the others to files."""

    def __init__(self, command: Sequence[str], count: int, meeting: Path) -> None:
        self.signal: int | None = None
        self.logs = [meeting / f"rank-{rank}.log" for rank in range(count)]
        self.first_to_fail: int | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        environment = dict(os.environ)
        # Ranks share the cores; more threads than cores wait for each other.
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment |= {"WORLD_SIZE": str(count), RENDEZVOUS: str(meeting / "store")}
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
                    )
                )

    def wait(self) -> list[int]:
        """Exit codes, once all have ended; when one fails the others are ended."""
        with self._forwarding():
            while True:
                codes = [process.poll() for process in self.processes]
                if all(code is not None for code in codes):
                    break
                failed = [rank for rank, code in enumerate(codes) if code]
                if failed and self.first_to_fail is None:
                    self.first_to_fail = failed[0]
                    self._end()
                time.sleep(POLL_S)
        return [process.wait() for process in self.processes]

    def tail(self, rank: int) -> str:
        """The last lines that a worker wrote to its file."""
        lines = self.logs[rank].read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-LAST_LINES:])

    def _end(self) -> None:
        """End those that are left: without a peer they would wait for it until a time-out.

        After a signal all are on their way out, and get a moment for it.
        """
        if self.signal is not None:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
                time.sleep(POLL_S)
        for process in self.processes:
            if process.poll() is None:
                process.kill()

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


class _Failure:
    """How an attempt ended, in words, as an error, and whether another one may do better."""

    def __init__(self, what: str, error: Exception, again: bool = False) -> None:
        self.what, self.error, self.again = what, error, again


def _judge(codes: Sequence[int], workers: Workers) -> _Failure | None:
    """What became of the workers; None where all ended well."""
    if not any(codes):
        return None
    if workers.signal is not None and not any(code == FAILED for code in codes):
        name = signal.Signals(workers.signal).name
        return _Failure(name, Interrupted(workers.signal, f"{name}: all workers have ended"))
    rank = workers.first_to_fail if workers.first_to_fail is not None else 0
    rank = next((r for r, code in enumerate(codes) if code in (1, 2)), rank)
    code, where = codes[rank], f"worker {rank} of {len(codes)}"
    written = "" if rank == 0 else f"\n{workers.tail(rank)}"
    if code == 2:
        return _Failure(where, UserError(f"{where} found a mistake (see above).{written}"))
    if code == 1:
        return _Failure(where, RunError(f"{where} ended with an error (see above).{written}"))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
    what = f"{where} {how}{written}"
    return _Failure(
        what,
        RunError(f"{what}\nThe same command goes on from the newest checkpoint."),
        again=True,
    )


def _say(line: str) -> None:
    sys.stderr.write(f"gristmill: {line}\n")
    sys.stderr.flush()

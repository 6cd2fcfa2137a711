"""Processes that work together: `ranks(4, function, *args)` runs a function on each of them.

Processes are started when they are first asked for and used again by every test. They are copies
of one that has imported what takes long, and end with the process of the tests, however that ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PR_SET_PDEATHSIG = 1
PRELOADED = [
    "gristmill.checkpoint.load",
    "gristmill.checkpoint.save",
    "gristmill.formats.hf",
    "gristmill.optim.build",
    "gristmill.parallel.parallelize",
    "torch.optim",
]
MOST = 8
TIMEOUT_S = 120.0


class Ranks:
    """A pool of processes, of which a call uses as many as it asks for."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, multiprocessing.connection.Connection]] = []

    def __call__(
        self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """What `function(*args)` returns on each of `world` ranks, in their order.

        It is a function of a test module, and what it takes and returns can be pickled. RANK,
        WORLD_SIZE, LOCAL_RANK and GRISTMILL_RENDEZVOUS are set, no process group is open. Fails
        with the traceback of a rank that raised; the others are then ended.
        """
        assert world <= MOST, f"at most {MOST} processes"
        self._start(world - len(self._workers))
        with tempfile.TemporaryDirectory(prefix="gristmill-ranks-") as folder:
            for rank in range(world):
                environment = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "GRISTMILL_RENDEZVOUS": str(Path(folder) / "store"),
                }
                self._workers[rank][1].send((environment, function, args))
            return self._collect(world, timeout_s)

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world: int, timeout_s: float) -> list[Any]:
        waiting = {self._workers[rank][1]: rank for rank in range(world)}
        results: list[Any] = [None] * world
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout_s)
            failure = None if ready else f"ranks {sorted(waiting.values())} do not answer"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    worked, value = pipe.recv()
                except EOFError:
                    worked, value = False, "the process has ended"
                if not worked:
                    failure = f"rank {rank} of {world}: {value}"
                    break
                results[rank] = value
            if failure is not None:
                self.close()
                pytest.fail(failure, pytrace=False)
        return results


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Run what comes through the pipe, one after the other."""
    # The server that this is a copy of ends when the tests do.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            environment, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs functions on several processes: see `Ranks.__call__`."""
    pool = Ranks()
    yield pool
    pool.close()

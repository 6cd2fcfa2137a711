"""Ends a run whose ranks have come to a stand, and says which one holds the others up.

A collective that one rank never joins waits without an end, and its own time-out knows only who
waits. So each rank tells the others now and then how far it has come, from a thread that goes on
while the process waits. A rank that has not moved for too long looks around: those who do not
speak any more, or have come less far than the others, are named, and the process ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from torch import distributed as dist

from gristmill.parallel.mesh import Mesh
from gristmill.util.reports import FAILED, Report, report

BEATS = 5
"""How often a rank speaks within the time that it may stand still."""


class Heartbeat:
    """Watches this rank from a thread; nothing for one process, or without a time."""

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        """Start to watch; all ranks come here together."""
        self._rank, self._world, self._timeout_s = mesh.rank, mesh.world, timeout_s
        self._moves, self._what, self._patient = 0, "the start", False
        self._closed = threading.Event()
        if mesh.world == 1:
            return
        self._store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store())
        self._tell(0)
        mesh.barrier()  # so that every rank has spoken
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def beat(self, what: str, *, patient: bool = False) -> None:
        """This rank has come to `what`; `patient` where that may take as long as it likes."""
        self._moves += 1
        self._what, self._patient = what, patient

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        """Speak, and look around when this rank has not moved for too long."""
        ticks = still = last = 0
        while not self._closed.wait(self._timeout_s / BEATS):
            ticks += 1
            self._tell(ticks)
            still = still + 1 if self._moves == last and not self._patient else 0
            last = self._moves
            if still > BEATS:
                before = self._heard()
                if self._closed.wait(1.5 * self._timeout_s / BEATS):
                    return
                self._tell(ticks + 1)
                if self._moves == last:
                    self._end(before, self._heard())

    def _tell(self, ticks: int) -> None:
        said = {"ticks": ticks, "moves": self._moves, "what": self._what}
        self._store.set(str(self._rank), json.dumps(said))

    def _heard(self) -> list[dict[str, Any]]:
        return [json.loads(self._store.get(str(rank))) for rank in range(self._world)]

    def _end(self, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
        message = verdict(before, now, self._rank, self._timeout_s)
        if not report(self._rank, Report("stalled", message)):
            sys.stderr.write(f"error: {message}. Run the same command again to go on.\n")
            sys.stderr.flush()
        os._exit(FAILED)


def verdict(
    before: list[dict[str, Any]], now: list[dict[str, Any]], own: int, timeout_s: float
) -> str:
    """Who holds the others up, from what each rank said at two moments."""
    start = f"the run has not moved for {timeout_s:g} s: "
    silent = [
        rank
        for rank, (a, b) in enumerate(zip(before, now, strict=True))
        if rank != own and a["ticks"] == b["ticks"]
    ]
    if silent:
        there = ", ".join(f"rank {rank} (last at {now[rank]['what']})" for rank in silent)
        return f"{start}{there} does not answer"
    least = min(said["moves"] for said in now)
    behind = [rank for rank, said in enumerate(now) if said["moves"] == least]
    if len(behind) == len(now):
        return f"{start}all ranks are at {now[own]['what']}; --stall_timeout gives them longer"
    first = max(now, key=lambda said: int(said["moves"]))
    there = ", ".join(f"rank {rank} is still at {now[rank]['what']}" for rank in behind)
    return f"{start}{there}, the first has come to {first['what']}"

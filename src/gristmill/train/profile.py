"""Where the time of some steps goes: a trace for a viewer, and a small table.

The loop names its parts with `section`, which is one comparison while nothing is profiled.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from gristmill.util.errors import UserError

FIRST, STEPS = 10, 5
"""`--profile true` takes this many steps, after so many that let everything warm up."""
TOP_OPERATORS = 10
LOSS = "_LinearCrossEntropy"
"""Name of the loss in a trace; it lies within the forward pass."""
PREFIX = "gristmill/"

_active: Profile | None = None


def section(name: str) -> AbstractContextManager[object]:
    """Count the time within it as part `name` of a step, if this step is profiled."""
    return contextlib.nullcontext() if _active is None else _active.part(name)


def window(typed: bool | str, *, start_step: int, total_steps: int) -> tuple[int, int] | None:
    """First and last step to profile, both included; None where none is asked for or left.

    Raises UserError for anything but true, false and FROM:TO.
    """
    if typed in (False, "false"):
        return None
    if typed in (True, "true"):
        last = min(start_step + FIRST + STEPS, total_steps)
        return (max(start_step + 1, last - STEPS + 1), last) if last > start_step else None
    first, colon, last_text = str(typed).partition(":")
    if not (colon and first.isdecimal() and last_text.isdecimal()):
        raise UserError(
            f"--profile {typed} is no window of steps. Give its first and last step as 20:25, or "
            "true.",
            {"--profile": "20:25"},
        )
    if not 1 <= int(first) <= int(last_text):
        raise UserError(
            f"--profile {typed} holds no step. Steps count from 1, and the first is not after the "
            "last.",
            {"--profile": "20:25"},
        )
    begin, end = max(int(first), start_step + 1), min(int(last_text), total_steps)
    return (begin, end) if begin <= end else None


class Profile:
    """Watches the steps `first` to `last` of a run and writes what it saw to `out_dir/profile`.

    On an accelerator it waits at the borders of each part, so that times are those of the work and
    not of its launch; steps take longer while they are watched.
    """

    def __init__(self, first: int, last: int, out_dir: Path, device: torch.device) -> None:
        self.first, self.last = first, last
        self._out_dir, self._device = out_dir, device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._depth = 0
        self._tracer: Any = None
        self._steps = 0
        self._started = 0.0

    def before_step(self, step: int) -> None:
        """Begin, if `step` is the first one to watch."""
        global _active
        if self._tracer is not None or not self.first <= step <= self.last:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        tracer = torch.profiler.profile(activities=kinds, acc_events=True)
        tracer.start()
        self._tracer, _active = tracer, self
        self._started = time.perf_counter()

    def after_step(self, step: int) -> list[str]:
        """Count a step; after the last one the lines that say where its time went."""
        if self._tracer is None:
            return []
        self._steps += 1
        return self.finish(step) if step >= self.last else []

    def finish(self, step: int) -> list[str]:
        """Stop watching and write the trace; the lines that say where the time went."""
        global _active
        tracer, self._tracer, _active = self._tracer, None, None
        if tracer is None:
            return []
        self._wait()
        total_s = time.perf_counter() - self._started
        tracer.stop()
        self.last = -1  # never again
        if self._steps == 0:
            return []
        folder = self._out_dir / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"steps-{step - self._steps + 1}-{step}.json.gz"
        tracer.export_chrome_trace(str(file))
        events = tracer.events()
        return [
            f"profile of {self._steps} steps, {1000 * total_s / self._steps:,.1f} ms each "
            f"(slower while watched): {file}",
            *self._parts(total_s, _loss_s(events)),
            *_operators(tracer.key_averages(), self._device.type != "cpu"),
        ]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within it; parts within a part count to the outer one."""
        self._wait()
        self._depth += 1
        started = time.perf_counter()
        try:
            with torch.profiler.record_function(PREFIX + name):
                yield
                self._wait()
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._seconds[name] += time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()

    def _parts(self, total_s: float, loss_s: float) -> list[str]:
        seconds = dict(self._seconds)
        if loss_s and "forward" in seconds:
            loss_s = min(loss_s, seconds["forward"])
            seconds["forward"] -= loss_s
            seconds["loss"] = loss_s
        seconds["other"] = max(0.0, total_s - sum(seconds.values()))
        return [
            f"  {name:<10} {1000 * part / self._steps:>9,.1f} ms a step  {part / total_s:>6.1%}"
            for name, part in sorted(seconds.items(), key=lambda item: -item[1])
        ]


def _loss_s(events: Any) -> float:
    """Seconds in the loss within forward passes of training (validation has a part of its own)."""
    total_us = 0.0
    for event in events:
        if event.name != LOSS:
            continue
        outer = event.cpu_parent
        while outer is not None and not outer.name.startswith(PREFIX):
            outer = outer.cpu_parent
        if outer is not None and outer.name == f"{PREFIX}forward":
            total_us += max(event.cpu_time_total, event.device_time_total)
    return total_us / 1e6


def _operators(averages: Any, on_device: bool) -> list[str]:
    """The operators that took most time by themselves."""
    kind = "self_device_time_total" if on_device else "self_cpu_time_total"
    found = [e for e in averages if not e.key.startswith((PREFIX, "ProfilerStep"))]
    total = sum(getattr(e, kind) for e in found) or 1.0
    top = sorted(found, key=lambda e: -getattr(e, kind))[:TOP_OPERATORS]
    lines = [f"  {'operator':<44} {'share':>6} {'calls':>7}"]
    for event in top:
        name = event.key if len(event.key) <= 44 else event.key[:41] + "..."
        lines.append(f"  {name:<44} {getattr(event, kind) / total:>6.1%} {event.count:>7,}")
    return lines

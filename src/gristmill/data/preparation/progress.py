"""How far a preparation is: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gristmill.data.preparation.units import Progress

_PLAIN_INTERVAL_S = 10.0
_LIVE_INTERVAL_S = 0.1
# Speed, and so the time left, is that of the last minute: machines come and go.
_SPEED_OVER_S = 60.0


class Meter:
    """Shows text, tokens, parts, speed, the time left and rejects, on standard error."""

    def __init__(self, unit_bytes: Mapping[int, int]) -> None:
        self._unit_bytes = unit_bytes
        self._all_bytes = max(1, sum(unit_bytes.values()))
        self._by_unit: dict[int, Progress] = {}
        self._sum = Progress()
        self._done_bytes = 0
        self._num_done = 0
        self._started = self._shown = time.monotonic()
        self._marks = [(self._started, 0, 0)]
        self._live: Any = None

    def __enter__(self) -> Meter:
        """Begin showing."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()

    def update(self, unit: int, progress: Progress) -> None:
        """Note how far a unit is, and show it when it is time to."""
        before = self._by_unit.get(unit, Progress())
        self._by_unit[unit] = replace(progress)
        for name in ("text_bytes", "documents", "tokens", "rejects"):
            change = getattr(progress, name) - getattr(before, name)
            setattr(self._sum, name, getattr(self._sum, name) + change)
        self._done_bytes += self._reached(unit, progress) - self._reached(unit, before)
        self._num_done += progress.committed - before.committed
        self._show(time.monotonic())

    def _show(self, now: float) -> None:
        interval = _PLAIN_INTERVAL_S if self._live is None else _LIVE_INTERVAL_S
        if now - self._shown < interval:
            return
        self._shown = now
        if self._live is None:
            # Nobody may be reading it any more; the work goes on.
            with contextlib.suppress(OSError):
                print(self._text(now), file=sys.stderr, flush=True)
        else:
            from rich.text import Text

            self._live.update(Text(self._text(now)), refresh=True)

    def _text(self, now: float) -> str:
        speed, tokens_per_s = self._speed(now)
        left = duration((self._all_bytes - self._done_bytes) / speed) if speed > 0 else "?"
        total = self._sum
        rejects = f" | {total.rejects:,} rejects" if total.rejects else ""
        return (
            f"preparing {self._done_bytes / self._all_bytes:4.0%} | "
            f"{self._num_done:,} of {len(self._unit_bytes):,} parts | "
            f"{total.documents:,} documents | {total.text_bytes / 1e6:,.0f} MB | "
            f"{total.tokens / 1e6:,.1f} M tokens | {tokens_per_s / 1e6:,.2f} M tokens/s | "
            f"{left} left{rejects}"
        )

    def _speed(self, now: float) -> tuple[float, float]:
        """Bytes of the plan and tokens a second, lately."""
        self._marks.append((now, self._done_bytes, self._sum.tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _SPEED_OVER_S:
            self._marks.pop(0)
        then, done_bytes, tokens = self._marks[0]
        seconds = max(now - then, 1e-9)
        return (self._done_bytes - done_bytes) / seconds, (self._sum.tokens - tokens) / seconds

    def _reached(self, unit: int, progress: Progress) -> int:
        """The part of a unit's bytes that is done; sizes of compressed text are estimates."""
        size = self._unit_bytes[unit]
        return size if progress.committed else min(size, progress.text_bytes)


def duration(seconds: float) -> str:
    """Seconds as people write them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

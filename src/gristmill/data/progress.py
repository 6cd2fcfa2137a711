"""How far a preparation is: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from gristmill.data.units import Progress

_PLAIN_INTERVAL_S = 10.0


class Meter:
    """Shows documents, text, tokens, speed and the time left, on standard error."""

    def __init__(self, total_bytes: int, num_units: int) -> None:
        self._total_bytes, self._num_units = max(1, total_bytes), num_units
        self._by_unit: dict[int, Progress] = {}
        self._started = self._shown = time.monotonic()
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
        self._by_unit[unit] = Progress(**vars(progress))
        now = time.monotonic()
        if self._live is not None and now - self._shown >= 0.1:
            self._live.update(self._text(now), refresh=True)
            self._shown = now
        elif self._live is None and now - self._shown >= _PLAIN_INTERVAL_S:
            print(self._text(now), file=sys.stderr, flush=True)
            self._shown = now

    def _text(self, now: float) -> str:
        done = self._by_unit.values()
        text = sum(p.text_bytes for p in done)
        documents, tokens = sum(p.documents for p in done), sum(p.tokens for p in done)
        seconds = now - self._started
        share = min(1.0, text / self._total_bytes)
        left = duration(seconds * (1 - share) / share) if share > 0 else "?"
        return (
            f"preparing {share:4.0%} | {documents:,} documents | {text / 1e6:,.0f} MB | "
            f"{tokens / 1e6:,.1f} M tokens | {text / 1e6 / max(seconds, 1e-9):,.1f} MB/s | "
            f"{left} left"
        )


def duration(seconds: float) -> str:
    """Seconds as people write them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

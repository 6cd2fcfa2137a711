"""How far a preparation is: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from gristmill.data.units import Progress

_PLAIN_INTERVAL_S = 10.0


class Meter:
    """Shows documents, text, tokens, speed and the time left, on standard error."""

    def __init__(self, unit_bytes: Mapping[int, int]) -> None:
        self._unit_bytes = unit_bytes
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
            from rich.text import Text

            self._live.update(Text(self._text(now)), refresh=True)
            self._shown = now
        elif self._live is None and now - self._shown >= _PLAIN_INTERVAL_S:
            print(self._text(now), file=sys.stderr, flush=True)
            self._shown = now

    def _text(self, now: float) -> str:
        done = self._by_unit.values()
        text = sum(p.text_bytes for p in done)
        documents, tokens = sum(p.documents for p in done), sum(p.tokens for p in done)
        seconds = now - self._started
        share = self._share()
        left = duration(seconds * (1 - share) / share) if share > 0 else "?"
        return (
            f"preparing {share:4.0%} | {documents:,} documents | {text / 1e6:,.0f} MB | "
            f"{tokens / 1e6:,.1f} M tokens | {text / 1e6 / max(seconds, 1e-9):,.1f} MB/s | "
            f"{left} left"
        )

    def _share(self) -> float:
        """The part of all work that is done, sizes of compressed text being estimates."""
        done = 0
        for unit, size in self._unit_bytes.items():
            progress = self._by_unit.get(unit, Progress())
            done += size if progress.committed else min(size, progress.text_bytes)
        return done / max(1, sum(self._unit_bytes.values()))


def duration(seconds: float) -> str:
    """Seconds as people write them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

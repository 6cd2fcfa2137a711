"""What a person sees of a run: live lines on a terminal, plain rows elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from gristmill.track.metrics import Row

if TYPE_CHECKING:
    from rich.console import RenderableType

# Drawing costs about a millisecond of the training thread; at this pace it is not felt.
DRAW_SECONDS = 0.25
# Rows in a file: often at first, rarer as the run gets longer.
FIRST_ROW_SECONDS = 5.0
LAST_ROW_SECONDS = 300.0
ROWS_PER_RUN = 30
# The remaining time follows the pace of about this many drawings.
PACE_SAMPLES = 120
BAR_WIDTH = 20

METRIC_FORMS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
}


class Console:
    """Shows rows of metrics as they come; calling it every step costs next to nothing.

    stream: standard output unless given. A terminal gets a progress bar that is redrawn at most
    four times a second; anything else gets whole lines, without control characters, every five
    seconds at first and every five minutes in a long run. A stream that goes away is forgotten.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = self._last_shown = clock()
        self._pace = _Pace(total_steps, start_step)
        self._row: dict[str, float | int] = {}
        self._step = self._shown_step = start_step
        self._waiting: deque[str] = deque()
        self._screen: _Screen = (
            _LiveScreen(self._stream) if _is_terminal(self._stream) else _PlainScreen(self._stream)
        )

    def start(self, summary: Mapping[str, object]) -> None:
        """Show what is about to run, one line an entry."""
        self._show(summary_lines(summary))

    def log(self, row: Row, step: int) -> None:
        """Take the row of a step; validation is always shown, the rest when it is due."""
        now = self._clock()
        self._row.update(row)
        self._step = step
        self._pace.begin(step, now)
        if self._waiting:
            self._flush_notes()
        if "val_loss" in row:
            self._show([validation_line(row, step)])
        if now - self._last_shown < self._screen.interval_s(now - self._started):
            return
        self._last_shown = now
        self._draw(now)

    def note(self, text: str) -> None:
        """Show a line now; from a signal handler in the midst of a write, with the next row."""
        self._waiting.append(text)
        self._flush_notes()

    def finished(
        self, final: Path | None = None, summary: Mapping[str, object] | None = None
    ) -> None:
        """Show the last row, what came of the run, and where the model is."""
        self._show_last()
        lines = summary_lines(summary or {})
        if final is not None:
            lines.append(f"model: {final}")
        self._show(lines)

    def close(self) -> None:
        """Show what has not been shown and give the terminal back."""
        self._flush_notes()
        self._show_last()

    def _show_last(self) -> None:
        """Show the last row, unless that was done when it came, and give the terminal back."""
        if self._step != self._shown_step:
            self._draw(self._clock())
        self._screen.stop()

    def _draw(self, now: float) -> None:
        self._shown_step = self._step
        left_s = self._pace.left_s(self._step, now)
        try:
            self._screen.draw(self._row, self._step, self._pace.total_steps, left_s)
        except (OSError, ValueError):
            self._screen = _NoScreen()

    def _show(self, lines: list[str]) -> None:
        try:
            self._screen.write("".join(f"{line}\n" for line in lines))
        except (OSError, ValueError):
            self._screen = _NoScreen()

    def _flush_notes(self) -> None:
        while self._waiting:
            text = self._waiting[0]
            try:
                self._screen.write(text + "\n")
            except RuntimeError:  # the write that the signal interrupted holds the stream
                return
            except (OSError, ValueError):
                self._screen = _NoScreen()
            self._waiting.popleft()


class _Screen(Protocol):
    def interval_s(self, elapsed_s: float) -> float: ...

    def draw(self, row: Row, step: int, total: int, left_s: float | None) -> None: ...

    def write(self, text: str) -> None: ...

    def stop(self) -> None: ...


class _PlainScreen:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def interval_s(self, elapsed_s: float) -> float:
        return min(max(FIRST_ROW_SECONDS, elapsed_s / ROWS_PER_RUN), LAST_ROW_SECONDS)

    def draw(self, row: Row, step: int, total: int, left_s: float | None) -> None:
        if "loss" in row:
            self.write(row_line(row, step, total, left_s) + "\n")

    def write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def stop(self) -> None:
        pass


class _LiveScreen:
    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._console = RichConsole(file=stream, highlight=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            # Warnings and prints of other code appear above the bar, unless they go to a file.
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._last_row: tuple[Row, int, int] | None = None

    def interval_s(self, elapsed_s: float) -> float:
        return DRAW_SECONDS

    def draw(self, row: Row, step: int, total: int, left_s: float | None) -> None:
        self._last_row = dict(row), step, total
        self._live.start()
        self._live.update(self._picture(row, step, total, left_s), refresh=True)

    def write(self, text: str) -> None:
        self._console.out(text, end="")

    def stop(self) -> None:
        """Take the bar away and leave the last row in its place."""
        self._live.stop()
        if self._last_row is not None:
            self.write(row_line(*self._last_row, left_s=None) + "\n")
            self._last_row = None

    def _picture(self, row: Row, step: int, total: int, left_s: float | None) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        position = f"{step / total:4.0%}  step {step:,}/{total:,}"
        if "tokens" in row:
            position += f"  {count(row['tokens'])} tokens"
        if left_s is not None:
            position += f"  {duration(left_s)} left"
        first = Table.grid(padding=(0, 2))
        first.add_row(ProgressBar(total=total, completed=step, width=BAR_WIDTH), Text(position))
        rest = {key: value for key, value in row.items() if key != "tokens"}
        numbers = Text(" · ".join(metric_parts(rest)), no_wrap=True, overflow="ellipsis")
        return Group(first, numbers)


class _NoScreen:
    """The stream is gone (a closed pipe); training is not."""

    def interval_s(self, elapsed_s: float) -> float:
        return LAST_ROW_SECONDS

    def draw(self, row: Row, step: int, total: int, left_s: float | None) -> None:
        pass

    def write(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class _Pace:
    """Seconds a step takes, lately, with all that happens between steps."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.total_steps = max(total_steps, 1)
        self._start_step = start_step
        self._samples: deque[tuple[float, int]] = deque([], PACE_SAMPLES)

    def begin(self, step: int, now: float) -> None:
        """Count from the end of the first step: what is compiled in it is compiled once."""
        if not self._samples and step > self._start_step:
            self._samples.append((now, step))

    def left_s(self, step: int, now: float) -> float | None:
        """Seconds to the last step; None before the second is done."""
        if not self._samples:
            return None
        self._samples.append((now, step))
        then, earlier = self._samples[0]
        if step <= earlier:
            return None
        return (now - then) / (step - earlier) * max(0, self.total_steps - step)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def row_line(row: Row, step: int, total: int, left_s: float | None) -> str:
    """A row of metrics as one line."""
    parts = [f"step {step:,}/{total:,}", *metric_parts(row)]
    if left_s is not None and step < total:
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def metric_parts(row: Row) -> list[str]:
    """The numbers of a row as short texts with units; what the row lacks is left out."""
    parts = [form.format(row[key]) for key, form in METRIC_FORMS.items() if key in row]
    if "tokens_per_s" in row and "mfu" not in row:
        parts.append("MFU n/a")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / 1e9:.2f} GB")
    if "tokens" in row:
        parts.append(f"{count(row['tokens'])} tokens")
    return parts


def validation_line(row: Row, step: int) -> str:
    """`step 1,000  val loss 3.2100  0.984 bits/byte`."""
    line = f"step {step:,}  val loss {row['val_loss']:.4f}"
    if "val_bits_per_byte" in row:
        line += f"  {row['val_bits_per_byte']:.3f} bits/byte"
    each = [(key[9:], value) for key, value in row.items() if key.startswith("val_loss/")]
    if each:
        line += "  (" + ", ".join(f"{name} {value:.4f}" for name, value in each) + ")"
    return line


def summary_lines(summary: Mapping[str, object]) -> list[str]:
    """A table of names and values, the values in one column."""
    width = max((len(name) for name in summary), default=0)
    return [f"{name:<{width}}  {value}" for name, value in summary.items()]


def count(number: float) -> str:
    """`12.3M` for 12,345,678; exact below ten thousand."""
    if number < 1e4:
        return f"{number:,.0f}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number / 1e3:.1f}k"


def duration(seconds: float) -> str:
    """`0:03:12`, and `2 d 03:04` from a day on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02}:{m:02}" if days else f"{h}:{m:02}:{s:02}"

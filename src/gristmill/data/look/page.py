"""Pages for people: styled on a terminal, the same words in plain text anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, TextIO

Part = str | tuple[str, str]
"""Text, or text and its style on a terminal, such as `bold` or `black on yellow`."""
Line = Part | Sequence[Part]

_EIGHTHS = " ▏▎▍▌▋▊▉"
_WIDEST = 120
_NARROWEST = 40


class Page:
    """Writes lines as they come. `is_terminal`: colours, and bars drawn with block characters."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._console: Any = None

    @property
    def width(self) -> int:
        """Columns there are; a fixed number where it is not a terminal, so that pages compare."""
        if not self.is_terminal:
            return 100
        return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))

    def line(self, *parts: Part) -> None:
        """Write one line; long ones are left to the terminal, never cut."""
        pieces = [(part, "") if isinstance(part, str) else part for part in parts]
        if self.is_terminal:
            self._styled(pieces)
            return
        text = "".join(text for text, _ in pieces).rstrip() + "\n"
        encoding = self._stream.encoding or "utf-8"
        # A text may hold any character; the place it goes to perhaps not.
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def bar(self, share: float, width: int) -> str:
        """A bar of `width` columns where `share` is 1; something small is never invisible."""
        filled = max(0.0, min(1.0, share)) * width
        if not self.is_terminal:
            return "#" * max(round(filled), 1 if share > 0 else 0)
        whole, rest = divmod(max(round(filled * 8), 1 if share > 0 else 0), 8)
        return "█" * whole + (_EIGHTHS[rest] if rest else "")

    def _styled(self, pieces: Sequence[tuple[str, str]]) -> None:
        from rich.console import Console
        from rich.text import Text

        if self._console is None:
            self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._console.print(Text.assemble(*pieces), soft_wrap=True)


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows of texts as lines, in columns; those numbered in `left` begin, the others end, at one
    place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if number in left else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def flowed(items: Sequence[str], width: int) -> list[str]:
    """Items with dots between them, in lines that are no wider where that is possible."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 3 + len(item) <= width:
            lines[-1] += f" · {item}"
        else:
            lines.append(item)
    return lines


def size(number: float) -> str:
    """Bytes as people write them: 512 bytes, 1.3 kB, 24.7 MB, 1.23 TB."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= power:
            digits = 2 if number < 10 * power else 1
            return f"{number / power:,.{digits}f} {unit}"
    return f"{number:,.0f} bytes"


def percent(share: float) -> str:
    """A share as 12.3 %; one too small for that as < 0.1 %."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{share:.1%}".replace("%", " %")


def counted(number: int, noun: str) -> str:
    """`1 chunk`, `2 chunks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

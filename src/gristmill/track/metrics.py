"""`metrics.jsonl`: every logged step of a run, once."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Row = Mapping[str, float | int]

FILE_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"


class _Lines:
    """Appends one JSON object a line, flushed line by line.

    Opening cuts the file back to `start_step`: rows of later steps belong to work that a restart
    makes again. A start at step 0 begins the file anew. Rows that a full disk refuses are kept in
    memory and written with the next.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rewrite(path, lambda lines: _up_to(lines, start_step))
        # Unbuffered: a row is one write, and is with the system before the next step begins.
        self._file = path.open("ab", buffering=0)
        self._end = path.stat().st_size
        self._pending = b""

    def add(self, values: Mapping[str, object], step: int) -> None:
        """Append a line. Raises OSError when it could not be written; it is then kept."""
        line = json.dumps({"step": step, **values}, allow_nan=False)
        self._pending += line.encode() + b"\n"
        self._flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        with self._file:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._pending:
                written = self._file.write(self._pending)
                self._end += written
                self._pending = self._pending[written:]
        except OSError:
            with contextlib.suppress(OSError):  # half a line may have gone out
                self._file.truncate(self._end)
            raise


class MetricsFile(_Lines):
    """`metrics.jsonl`: one line a row; what is not finite becomes null."""

    def __init__(self, out_dir: Path, start_step: int) -> None:
        super().__init__(out_dir / FILE_NAME, start_step)

    def log(self, row: Row, step: int) -> None:
        """Append a row. Raises OSError when it could not be written; it is then kept."""
        self.add({key: _plain(value) for key, value in row.items()}, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Nothing: `samples.jsonl` takes texts."""


class SamplesFile(_Lines):
    """`samples.jsonl`: one line a text, made with the first one."""

    def __init__(self, out_dir: Path, start_step: int) -> None:
        self._path, self._start_step = out_dir / SAMPLES_NAME, start_step
        self._open = False
        if self._path.exists():
            self._begin()

    def _begin(self) -> None:
        super().__init__(self._path, self._start_step)
        self._open = True

    def log(self, row: Row, step: int) -> None:
        """Nothing: `metrics.jsonl` takes rows."""

    def text(self, name: str, text: str, step: int) -> None:
        """Append a text. Raises OSError when it could not be written; it is then kept."""
        if not self._open:
            self._begin()
        self.add({"name": name, "text": text}, step)

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._open:
            super().close()


def rewrite(path: Path, keep: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
    """Replace a file by the lines of it that `keep` yields, in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        new.writelines(keep(old))
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)


def _up_to(lines: Iterable[bytes], start_step: int) -> Iterable[bytes]:
    for line in lines:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line a kill tore
        if line.endswith(b"\n") and step <= start_step and start_step > 0:
            yield line


def _plain(value: float | int) -> float | int | None:
    return value if isinstance(value, int) or math.isfinite(value) else None

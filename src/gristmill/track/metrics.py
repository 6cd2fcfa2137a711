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


class MetricsFile:
    """Appends one JSON object a line, flushed line by line; what is not finite becomes null.

    Opening cuts the file back to `start_step`: rows of later steps belong to work that a restart
    makes again. A start at step 0 begins the file anew. Rows that a full disk refuses are kept in
    memory and written with the next.
    """

    def __init__(self, out_dir: Path, start_step: int) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / FILE_NAME
        if path.exists():
            rewrite(path, lambda lines: _up_to(lines, start_step))
        # Unbuffered: a row is one write, and is with the system before the next step begins.
        self._file = path.open("ab", buffering=0)
        self._end = path.stat().st_size
        self._pending = b""

    def log(self, row: Row, step: int) -> None:
        """Append a row. Raises OSError when it could not be written; it is then kept."""
        values = {key: _plain(value) for key, value in row.items()}
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

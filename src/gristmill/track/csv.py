"""`metrics.csv`: the same rows for spreadsheets, one column per metric, empty if not measured."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from gristmill.track.metrics import Row

FILE_NAME = "metrics.csv"
COLUMNS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "samples",
    "tokens_per_s",
    "step_time_s",
    "data_wait_s",
    "mfu",
    "memory_bytes",
    "epoch",
    "val_loss",
    "val_bits_per_byte",
)


class CsvFile:
    """Appends rows; a metric not seen before gets a new column at the end.

    Opening cuts the file back to `start_step`, as `MetricsFile` does.
    """

    def __init__(self, out_dir: Path, start_step: int) -> None:
        self._path = out_dir / FILE_NAME
        self._columns = list(COLUMNS)
        kept: list[dict[str, str]] = []
        if self._path.exists() and start_step > 0:
            for row in self._read():
                if row["step"].isdigit() and int(row["step"]) <= start_step:
                    kept.append(row)
        self._write_all(kept)

    def log(self, row: Row, step: int) -> None:
        """Append a row and flush it."""
        new = [key for key in row if key not in self._columns]
        if new:
            self._file.close()
            kept = self._read()
            self._columns += new
            self._write_all(kept)
        self._writer.writerow({"step": step, **row})
        self._file.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Nothing: a table of numbers has no place for it."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> list[dict[str, str]]:
        with self._path.open(newline="") as stream:
            lines = [line for line in stream if line.endswith("\n")]  # the last may be torn
        reader = csv.DictReader(lines)
        rows = list(reader)
        self._columns += [c for c in reader.fieldnames or () if c not in self._columns]
        return rows

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        temporary = self._path.with_name(f".{FILE_NAME}.tmp")
        self._file = temporary.open("w", newline="")
        self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._file.flush()
        os.replace(temporary, self._path)

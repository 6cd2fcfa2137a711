"""Where the numbers of a run go: `metrics.jsonl` always, others by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gristmill.config.sections import LogArgs
from gristmill.track.csv import CsvFile
from gristmill.track.metrics import MetricsFile, Row
from gristmill.track.tensorboard import TensorBoard
from gristmill.track.wandb import WeightsAndBiases
from gristmill.util.errors import UserError

NAMES = ("csv", "tensorboard", "wandb")


class Tracker(Protocol):
    """Takes rows of numbers, step by step."""

    def log(self, row: Row, step: int) -> None:
        """Take the row of a step; its keys carry their units."""

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""


class Trackers:
    """Several trackers as one. One that fails is named once and never stops the run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._failed: set[str] = set()

    def log(self, row: Row, step: int) -> None:
        """Give the row of a step to every tracker."""
        for tracker in self._trackers:
            try:
                tracker.log(row, step)
            except Exception as error:
                self._say_once(tracker, error)

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self._say_once(tracker, error)

    def _say_once(self, tracker: Tracker, error: Exception) -> None:
        name = type(tracker).__name__
        if name not in self._failed:
            self._failed.add(name)
            sys.stderr.write(
                f"gristmill: {name} did not take a row of metrics ({error}). Training goes on; "
                "this is said once.\n"
            )


def open_trackers(
    names: Sequence[str], out_dir: str | Path, log: LogArgs, start_step: int
) -> Trackers:
    """`metrics.jsonl` and the trackers in `names`, ready for the step after `start_step`.

    Raises UserError for an unknown name or a package that is not installed.
    """
    out_dir = Path(out_dir)
    unknown = [name for name in names if name not in (*NAMES, "none")]
    if unknown:
        raise UserError(
            f"the tracker {unknown[0]} is not known. "
            f"Set --logger_name to one of none, {', '.join(NAMES)}."
        )
    trackers: list[Tracker] = [MetricsFile(out_dir, start_step)]
    if "csv" in names:
        trackers.append(CsvFile(out_dir, start_step))
    if "tensorboard" in names:
        trackers.append(TensorBoard(out_dir, start_step))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(out_dir, log))
    return Trackers(trackers)

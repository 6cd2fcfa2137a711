"""Where the numbers of a run go: `metrics.jsonl` always, others by name, several at once."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from gristmill.config.sections import LogArgs
from gristmill.track.csv import CsvFile
from gristmill.track.metrics import MetricsFile, Row, SamplesFile
from gristmill.track.mlflow import MLflow
from gristmill.track.tensorboard import TensorBoard
from gristmill.track.trackio import Trackio
from gristmill.track.wandb import WeightsAndBiases
from gristmill.util.errors import UserError
from gristmill.util.extras import install_command
from gristmill.util.secrets import redact

NAMES = ("csv", "tensorboard", "wandb", "mlflow", "trackio")

TAKERS = {
    "project": ("wandb", "mlflow", "trackio"),
    "run": ("wandb", "mlflow", "trackio"),
    "group": ("wandb", "trackio"),
}
"""Setting of `--log` -> the trackers that have a use for it."""


class Tracker(Protocol):
    """Takes rows of numbers, and texts, step by step."""

    def log(self, row: Row, step: int) -> None:
        """Take the row of a step; its keys carry their units."""

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text of a step, or leave it."""

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""


class Trackers:
    """Several trackers as one. One that fails is named, left out from then on, and stops nothing.

    The run's own files are `patient`: they keep what a full disk refuses, and try again.
    """

    def __init__(self, trackers: Sequence[Tracker], patient: Sequence[Tracker] = ()) -> None:
        self._trackers = [*patient, *trackers]
        self._patient = {id(tracker) for tracker in patient}
        self._failed: set[int] = set()

    def log(self, row: Row, step: int) -> None:
        """Give the row of a step to every tracker."""
        self._each(lambda tracker: tracker.log(row, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Give a text of a step to every tracker."""
        self._each(lambda tracker: tracker.text(name, text, step))

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())

    def _each(self, give: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                give(tracker)
            except Exception as error:
                self._fail(tracker, error)

    def _fail(self, tracker: Tracker, error: Exception) -> None:
        patient = id(tracker) in self._patient
        if not patient:
            self._trackers.remove(tracker)
        if id(tracker) not in self._failed:
            self._failed.add(id(tracker))
            after = "is tried again with the next" if patient else "gets no more of them"
            _say(f"{type(tracker).__name__} did not take metrics ({error}) and {after}")


def _say(what: str) -> None:
    sys.stderr.write(redact(f"gristmill: {what}. Training goes on; this is said once.\n"))


def tracker_names(typed: str | Sequence[str]) -> list[str]:
    """The trackers that `--logger_name` names, each once: a name, names with commas, or a list.

    Raises UserError for an unknown one.
    """
    parts = typed.split(",") if isinstance(typed, str) else [str(name) for name in typed]
    names = list(dict.fromkeys(part.strip() for part in parts))
    unknown = [name for name in names if name not in (*NAMES, "none")]
    if unknown:
        raise UserError(
            f"--logger_name {unknown[0] or repr('')} is not known. Choose none, or one or more of "
            f"{', '.join(NAMES)}, as --logger_name csv,tensorboard."
        )
    if "none" in names and len(names) > 1:
        raise UserError(
            f"--logger_name {','.join(names)} asks for no tracker and for one. Leave out none.",
            {"--logger_name": ",".join(name for name in names if name != "none")},
        )
    return [name for name in names if name != "none"]


def check_settings(typed: str | Sequence[str], log: LogArgs) -> None:
    """Raise UserError for unknown trackers and for settings that none of the chosen has a use for.

    Nothing is imported or opened.
    """
    names = tracker_names(typed)
    for setting, takers in TAKERS.items():
        if getattr(log, setting) is None or set(names) & set(takers):
            continue
        raise UserError(
            f"--log.{setting} is given, and no chosen tracker takes it "
            f"(--logger_name {','.join(names) or 'none'}). Add one of {', '.join(takers)}, or "
            "leave it out.",
            {"--logger_name": ",".join([*names, takers[0]])},
        )


def open_trackers(
    typed: str | Sequence[str], out_dir: str | Path, log: LogArgs, start_step: int
) -> Trackers:
    """The run's own files and the trackers typed, ready for the step after `start_step`.

    Raises UserError for an unknown name, a package that is not installed, and a service that
    refuses a first start. For a run that goes on the last is a line, and the run does without it.
    """
    out_dir = Path(out_dir)
    names = tracker_names(typed)
    own = MetricsFile(out_dir, start_step), SamplesFile(out_dir, start_step)
    trackers = []
    for name in names:
        tracker = _open(name, out_dir, log, start_step)
        if tracker is not None:
            trackers.append(tracker)
    return Trackers(trackers, patient=own)


def _open(name: str, out_dir: Path, log: LogArgs, start_step: int) -> Tracker | None:
    project, run = log.project or "gristmill", log.run or out_dir.resolve().name
    try:
        if name == "csv":
            return CsvFile(out_dir, start_step)
        if name == "tensorboard":
            return TensorBoard(out_dir, start_step)
        if name == "wandb":
            number = run_id(out_dir / "wandb_id")
            return WeightsAndBiases(out_dir, number, project, run, log.group)
        if name == "mlflow":
            return MLflow(out_dir, project, run)
        return Trackio(project, log.run or f"{run}-{run_id(out_dir / 'trackio_id')}", log.group)
    except ImportError as error:
        raise UserError(
            f"--logger_name {name} needs the package {name}, which cannot be imported ({error}). "
            f"Install it: {install_command(name)}"
        ) from None
    except Exception as error:
        if start_step == 0:
            raise UserError(
                redact(f"--logger_name {name} did not start ({error}). {HINTS.get(name, MEND)}")
            ) from None
        _say(f"--logger_name {name} did not start ({error}) and gets nothing")
        return None


MEND = "Mend that, or leave it out."
HINTS = {
    "wandb": "Log in with `wandb login`, or set WANDB_MODE=offline.",
    "mlflow": "Set MLFLOW_TRACKING_URI to a server that answers or to a folder, or leave it out.",
}


def run_id(file: Path) -> str:
    """What the run is called at a service, made once and kept in its directory."""
    if file.exists():
        return file.read_text().strip()
    name = uuid.uuid4().hex[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(name + "\n")
    return name

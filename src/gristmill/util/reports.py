"""How a worker tells the launcher that started it in what way it has ended.

The word is a small file in a folder that the launcher names, so that a mistake is shown once, in
the words and with the corrected command of whoever typed it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gristmill.util.errors import Interrupted, RunError, UserError

REPORTS = "GRISTMILL_REPORTS"
"""Environment variable: the folder in which workers tell their launcher how they ended."""
LAUNCHER = "GRISTMILL_LAUNCHER"
"""Environment variable: process id of the launcher."""
FAILED = 70
"""Exit code of a worker for a failure that another attempt may not have."""

FINAL = ("user", "run", "interrupted")
"""Endings that another attempt would only repeat, the most telling first."""


@dataclass(frozen=True)
class Report:
    """How a worker ended, as it says itself."""

    kind: str
    """user, run, interrupted, stalled or failed."""
    message: str
    fix: dict[str, Any] = field(default_factory=dict)
    signal: int = 0

    def error(self, rank: int, world: int) -> Exception:
        """The error that the command ends with."""
        if self.kind == "user":
            return UserError(self.message, self.fix)
        if self.kind == "run":
            return RunError(self.message)
        if self.kind == "interrupted":
            return Interrupted(self.signal, self.message)
        where = "" if self.kind == "stalled" else f"worker {rank} of {world} failed: "
        return RunError(
            f"{where}{self.message}. The same command goes on from the newest checkpoint."
        )


def report(rank: int, content: Report) -> bool:
    """Leave word for the launcher; False where there is none that reads it."""
    if REPORTS not in os.environ:
        return False
    file = _file(Path(os.environ[REPORTS]), rank)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(content), default=str), encoding="utf-8")
    temporary.replace(file)
    return True


def read_report(folder: Path, rank: int) -> Report | None:
    """The word that a worker left; None where it could not."""
    try:
        return Report(**json.loads(_file(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _file(folder: Path, rank: int) -> Path:
    return folder / f"report-{rank}.json"

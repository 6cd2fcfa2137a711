"""What is particular to a process that a launcher of ours started.

Its launcher is told how it ended by a small file in the folder where the ranks meet, so that a
mistake is shown once, in the words and with the corrected command of whoever typed it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gristmill.util.errors import Interrupted, RunError, UserError

RENDEZVOUS = "GRISTMILL_RENDEZVOUS"
"""The file in which the ranks of one machine meet."""
LAUNCHER = "GRISTMILL_LAUNCHER"
"""Process id of the launcher."""
FAILED = 70
"""Exit code of a worker for a failure that another attempt may not have."""

PR_SET_PDEATHSIG = 1
PARENT_POLL_S = 1.0


def is_worker() -> bool:
    """Whether a launcher of ours started this process."""
    return RENDEZVOUS in os.environ


def die_with_parent() -> None:
    """Have this process end at once when its launcher ends, however that ends."""
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it ended before
        os._exit(FAILED)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PARENT_POLL_S)
    os._exit(FAILED)


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


def report(rank: int, content: Report) -> None:
    """Leave word for the launcher."""
    file = _report_file(Path(os.environ[RENDEZVOUS]).parent, rank)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(content), default=str), encoding="utf-8")
    temporary.replace(file)


def read_report(meeting: Path, rank: int) -> Report | None:
    """The word that a worker left; None where it could not."""
    try:
        return Report(**json.loads(_report_file(meeting, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _report_file(meeting: Path, rank: int) -> Path:
    return meeting / f"report-{rank}.json"


def run_as_worker(work: Callable[[], None]) -> None:
    """Do the work of one rank; ends the process with a code and a report where it fails."""
    die_with_parent()
    rank = int(os.environ["RANK"])
    try:
        work()
        return
    except UserError as error:
        code, said = 2, Report("user", str(error), error.fix)
    except RunError as error:
        code, said = 1, Report("run", str(error))
    except Interrupted as stop:
        code = 128 + stop.signal_number
        said = Report("interrupted", str(stop), signal=stop.signal_number)
    except KeyboardInterrupt:
        code, said = 130, Report("interrupted", "interrupted", signal=signal.SIGINT)
    except (RuntimeError, OSError) as error:
        # Hardware, a neighbour that is gone: another attempt may have better luck.
        if rank:
            traceback.print_exc()
        code, said = FAILED, Report("failed", f"{type(error).__name__}: {_first_line(error)}")
    report(rank, said)
    # Threads of a process group whose other ranks are gone would be waited for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"

"""What is particular to a process that a launcher of ours started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from gristmill.checkpoint.ranks import OtherRankError
from gristmill.util.errors import Interrupted, RunError, UserError
from gristmill.util.reports import FAILED, LAUNCHER, REPORTS, Report, report

PR_SET_PDEATHSIG = 1
PARENT_POLL_S = 1.0
OTHERS_WAIT_S = 3.0
"""Before a rank ends because of another one's mistake, so that the other is heard first."""


def is_worker() -> bool:
    """Whether a launcher of ours started this process."""
    return REPORTS in os.environ


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
    except OtherRankError as error:
        time.sleep(OTHERS_WAIT_S)
        code, said = FAILED, Report("failed", str(error))
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

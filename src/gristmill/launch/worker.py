"""What is particular to a process that a launcher of ours started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

RENDEZVOUS = "GRISTMILL_RENDEZVOUS"
"""The file in which the ranks of one machine meet."""
FAILED = 70
"""Exit code of a worker for a failure that another attempt may not have."""

PR_SET_PDEATHSIG = 1


def is_worker() -> bool:
    """Whether a launcher of ours started this process."""
    return RENDEZVOUS in os.environ


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher ends, however that ends (Linux)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(FAILED)

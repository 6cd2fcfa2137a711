"""Two manners of torch.distributed.checkpoint that would otherwise reach the user."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch.distributed.checkpoint.api import CheckpointException


def quiet_single_process() -> None:
    """Drop torch's remark that one process saves alone; that is how a run on one device works."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the error of the first rank that failed.

    torch wraps it in a BaseException that no `except Exception` catches, with a traceback as text.
    """
    try:
        yield
    except CheckpointException as error:
        first = min(error.failures)
        raise error.failures[first][0] from None

"""One unit's work, the same in a process of this machine, on a Ray cluster and in an array."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace

from gristmill.data.look.page import size
from gristmill.data.preparation.executors import Task
from gristmill.data.preparation.units import Engine, Progress, run_unit
from gristmill.data.preparation.workspace import Workspace
from gristmill.data.storage import Storage
from gristmill.tokenizer.engines import open_engine
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError


class Work:
    """The job as one process needs it: plan, input and engine, loaded once."""

    def __init__(self, task: Task) -> None:
        """Load what `task` names. Raises UserError when this machine lacks the job's engine."""
        self._on_error = task.on_error
        self._root = Storage(task.root)
        self._space = Workspace.open(Storage(task.out))
        self._plan, choice = self._space.load()
        self._engine: Engine = open_engine(Tokenizer.load(self._space.tokenizer_dir), choice)

    def run(self, unit: int, report: Callable[[Progress], None]) -> None:
        """Run one unit and commit it.

        Raises DataError for a damaged input: other units can still be done. All other errors
        (disk full, a bad record with on_error=fail) end the job.
        """
        latest = Progress()

        def note(progress: Progress) -> None:
            nonlocal latest
            latest = progress
            report(progress)

        try:
            with self._space.writing(unit, self._plan) as folder:
                run_unit(self._plan, unit, self._root, self._engine, folder, note, self._on_error)
        except OSError as error:
            raise write_error(error, self._space.out) from error
        report(replace(latest, committed=True))


def write_error(error: OSError, out: Storage) -> UserError | RunError:
    """What to tell the user about a failed write below `out`."""
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError) or (
        error.errno == errno.EROFS
    ):
        return UserError(
            f"cannot write in {out.root} ({error.strerror or error}). "
            "name another --output_dir, or make it writable."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and out.is_local:
        status = os.statvfs(out.path)
        free = status.f_bavail * status.f_frsize
        return RunError(
            f"no space left for {out.root} ({size(free)} free). free some and run the same "
            "command again: what is done is kept."
        )
    return RunError(
        f"cannot write in {out.root} ({error}). run the same command again when it works: "
        "what is done is kept."
    )

"""A directory or file that appears whole or not at all: built beside its place, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gristmill.util.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where to build (`new`, which does not exist yet), and the place it is for."""

    new: Path
    target: Path

    def finish(self) -> None:
        """Put what was built in the place of the target."""
        old = self.new.with_name(_OLD)
        if self.target.exists():
            os.rename(self.target, old)
        os.rename(self.new, self.target)


_OLD = "replaced"


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Place]:
    """A hidden directory beside `target` to build in, gone when the block ends however it ends.

    What a killed process left is cleared first; what it had moved aside comes back. Raises
    UserError when another process builds for the same target.
    """
    work = target.with_name(f".{target.name}.export")
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process writes {target}. Wait for it, or write elsewhere."
            ) from None
        try:
            if (work / _OLD).exists() and not target.exists():
                os.rename(work / _OLD, target)
            _clear(work)
            yield Place(work / target.name, target)
        finally:
            if not (work / _OLD).exists() or target.exists():
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

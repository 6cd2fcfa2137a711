"""A directory or file that appears whole or not at all: built beside its place, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gristmill.util.errors import RunError, UserError


@dataclass(frozen=True)
class Place:
    """Where to build (`new`, which does not exist yet), and the place it is for."""

    new: Path
    target: Path
    old: Path
    """Where what was at `target` lies between the two renames."""

    def finish(self) -> None:
        """Put what was built in the place of the target; it is on disk before it is seen."""
        _sync(self.new)
        if self.target.exists():
            os.rename(self.target, self.old)
        os.rename(self.new, self.target)
        _sync_one(self.target.parent)


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Place]:
    """A hidden directory beside `target` to build in, gone when the block ends however it ends.

    What a killed process left is cleared first; what it had moved aside comes back. Raises
    UserError when another process builds for the same target.
    """
    work = target.with_name(f".{target.name}.partial")
    place = Place(work / "new" / target.name, target, work / "old" / target.name)
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
            _put_back(place)
            _clear(work)
            place.new.parent.mkdir()
            place.old.parent.mkdir()
            yield place
        finally:
            _put_back(place)
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)


class NotWritten(RunError):
    """A place that could not be written to."""

    def __init__(self, place: Path, reason: object) -> None:
        """Keep the reason, for who knows the place by another name."""
        super().__init__(f"{place} could not be written ({reason}). Free space and try again.")
        self.reason = reason


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raises NotWritten with the name of `place` when the disk is full or refuses, whatever the
    name of what is written on the way there."""
    try:
        yield
    except NotWritten as error:
        raise NotWritten(place, error.reason) from None
    except OSError as error:
        raise NotWritten(place, error.strerror or error) from None


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when all went well, in place of one that is there.

    Raises NotWritten when the disk is full or cannot be written to.
    """
    with writing(out), beside(out) as place:
        place.new.mkdir()
        yield place.new
        place.finish()


def _put_back(place: Place) -> None:
    """The old one again, where the new one did not take its place."""
    if place.old.exists() and not place.target.exists():
        os.rename(place.old, place.target)


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    """fsync a file, or a directory and all in it, so that a rename never shows an empty file."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

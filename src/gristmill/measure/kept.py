"""Answers in a file as they come: what a stopped evaluation has computed is not computed again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from gristmill.infer.load import note


class Kept:
    """Answers by what was asked, a line each, appended to a file.

    `about` is what all of them depend on, the model above all. Several evaluations may append at
    once, and what is no whole line is passed over. `forever` false takes what was asked for out of
    the file at the end of a `with` block that nothing stopped; what another evaluation left there
    when it was stopped stays. Without a path nothing outlives the process.
    """

    def __init__(self, path: Path | None, about: object = None, *, forever: bool = False) -> None:
        self.path, self.forever = path, forever
        self._about = _digest(about)
        self._answers: dict[str, list[Any]] = {}
        self._asked: set[str] = set()
        self._file: int | None = None
        if path is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    key, *answer = json.loads(line)
                    self._answers[key] = answer

    def key(self, *asked: object) -> str:
        """What an answer is found by."""
        return _digest((self._about, *asked))

    def find(self, keys: Sequence[str]) -> list[list[Any] | None]:
        """What is kept for each key, if anything; how many they are is said."""
        self._asked.update(keys)
        found = [self._answers.get(key) for key in keys]
        if count := sum(answer is not None for answer in found):
            note(f"{count:,} of {len(keys):,} answers are there already ({self.path})")
        return found

    def put(self, entries: Iterable[tuple[str, Sequence[Any]]]) -> None:
        """Keep answers; where the disk does not take them, say so once and go on."""
        new = {key: list(answer) for key, answer in entries}
        if not new or self.path is None:
            return
        self._answers |= new
        self._asked.update(new)
        lines = "".join(json.dumps([key, *answer]) + "\n" for key, answer in new.items())
        try:
            if self._file is None:
                self._file = _opened(self.path)
            os.write(self._file, lines.encode())
        except OSError as error:
            note(f"Answers cannot be kept in {self.path} ({error.strerror}); going on without.")
            self.path = None

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.path is None or not self._answers:
            return
        if kind is not None:
            note(
                f"{len(self._answers):,} answers are kept in {self.path}; the same command goes on "
                "from there."
            )
        elif not self.forever:
            with contextlib.suppress(OSError):  # another evaluation writes to it
                self._file = self._file or _opened(self.path)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _keep_only(self.path, self._answers.keys() - self._asked)
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _keep_only(path: Path, keys: Collection[str]) -> None:
    """Drop the lines of all other keys, and the file with the last."""
    if not keys:
        path.unlink()
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with path.open("rb") as lines, temporary.open("wb") as rest:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, IndexError):
                if json.loads(line)[0] in keys:
                    rest.write(line)
    os.replace(temporary, path)


def _opened(path: Path) -> int:
    """The file, to be appended to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with contextlib.suppress(OSError):  # some file systems of networks lock no files
        fcntl.flock(file, fcntl.LOCK_SH)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")  # behind a line that was cut short
    return file


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=12).hexdigest()

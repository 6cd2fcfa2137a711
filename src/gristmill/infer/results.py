"""Texts as JSON lines in a file that appears when it is complete; what is begun goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gristmill.util.errors import RunError, UserError

Place = tuple[int, int]
"""Number of the prompt, and of the sample of it."""


class ResultFile:
    """Collects records beside the file `path`, and puts them there in order at the end.

    What another command has collected there is not touched without `overwrite`; what the same
    command (`job`: all that shapes its texts) has collected is kept, and `done` names it.
    Raises UserError for a path that cannot be, RunError when writing fails.
    """

    def __init__(self, path: str, job: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = Path(path).expanduser()
        self.done: set[Place] = set()
        self._overwrite = overwrite
        if self.path.is_dir():
            raise UserError(f"--output {path} is a directory. name a file, such as texts.jsonl.")
        self.partial = self.path.with_name(self.path.name + ".partial")
        text = json.dumps(job, sort_keys=True, default=str)
        header = json.dumps({"job": hashlib.sha256(text.encode()).hexdigest()}) + "\n"
        try:
            self._check_free()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                self._file = undo.enter_context(self._opened())
                undo.callback(self._forget_nothing)
                self._check_free()
                lines = self._collected(header.encode())
                # A line that was cut off in the middle goes.
                self._file.truncate(sum(map(len, lines)))
                if not lines:
                    self._file.write(header.encode())
                    self._file.flush()
                undo.pop_all()
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror}). name a file in a folder of your own."
            ) from error
        self.done = {(index, sample) for index, sample, _ in map(json.loads, lines[1:])}

    def _check_free(self) -> None:
        if self.path.exists() and not self._overwrite:
            raise UserError(
                f"{self.path} exists. name another file, or replace it with --overwrite true.",
                {"--overwrite": "true"},
            )

    def _forget_nothing(self) -> None:
        """Remove what is collected in, where nothing is."""
        if self.partial.stat().st_size == 0:
            self.partial.unlink()

    def _opened(self) -> BinaryIO:
        """What is collected in, kept from other processes until it is closed."""
        while True:
            file = self.partial.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"another process is writing {self.path} now. wait for it, stop it, or name "
                    "another file with --output."
                ) from None
            except OSError:
                return file  # a file system without locks
            # Another process may have ended, and removed it, in between.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
                    return file
            file.close()

    def _collected(self, header: bytes) -> list[bytes]:
        """The lines that the same command has collected, the first being its header."""
        lines = self.partial.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole[:1] == [header]:
            return whole
        if len(whole) > 1 and not self._overwrite:
            raise UserError(
                f"{self.partial} holds texts of another command, which has not ended. run that "
                "again, name another file, or begin anew with --overwrite true.",
                {"--overwrite": "true"},
            )
        return []

    def __enter__(self) -> ResultFile:
        """Collect."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Keep what was collected; without an error, it becomes the file."""
        if kind is None:
            self._finish()
        else:
            with contextlib.suppress(OSError), self._file:
                if not self.done:
                    self.partial.unlink()

    def add(self, place: Place, record: Mapping[str, Any]) -> None:
        """Keep one more record."""
        line = json.dumps([*place, record], ensure_ascii=False) + "\n"
        with self._writing():
            self._file.write(line.encode("utf-8", "replace"))
            self._file.flush()
        self.done.add(place)

    def _finish(self) -> None:
        # It stays locked until its place is taken.
        with self._writing(), self._file:
            self._file.flush()
            found = [json.loads(line) for line in self.partial.read_bytes().splitlines()[1:]]
            found.sort(key=lambda item: (item[0], item[1]))
            ordered = self.partial.with_name(self.partial.name + ".ordered")
            with ordered.open("wb") as file:
                file.writelines(to_line(record).encode() for _, _, record in found)
                file.flush()
                os.fsync(file.fileno())
            ordered.replace(self.path)
            self.partial.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Any:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write {self.partial} ({error.strerror}). {len(self.done):,} texts are in "
                "it; free some space, and the same command goes on."
            ) from error


def to_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"

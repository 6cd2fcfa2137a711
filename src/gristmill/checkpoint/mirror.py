"""A second home of a run: an object store, or any other place that fsspec opens.

    out_dir/ on a disk ── after each save ──▶ URL/run.yaml, metrics.jsonl, step-*/, final/
    out_dir/ empty     ◀── before a run ───── its record and its newest checkpoint

Checkpoints are made on a disk, where a rename makes them whole, and copied from there while
training goes on. Of a copy the record comes last and goes first, as on the disk.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

from gristmill.checkpoint import store
from gristmill.checkpoint.ranks import reason
from gristmill.data.storage import Storage
from gristmill.util.errors import RunError, UserError

FINAL = "final"
SMALL_FILES = ("run.yaml", "metrics.jsonl", "metrics.csv")
"""Files of the run itself that go with every checkpoint."""
_FETCHED = ".fetched"


class Mirror:
    """Copies the checkpoints of `out_dir` to a URL in a thread of its own.

    A copy that fails prints one line and is tried again after the next save; training does not
    wait for copies, so a slow store gets the newest checkpoint, not each of them. Retention is
    that of the run: `keep_last` newest, and those of `keep_every`.
    """

    def __init__(
        self, url: str, out_dir: Path, *, keep_last: int, keep_every: int | None = None
    ) -> None:
        self.failed: str | None = None
        """Why the last copy failed, if it did."""
        self._place, self._out_dir = Storage(url), out_dir
        self._keep_last, self._keep_every = keep_last, keep_every
        self._wanted, self._closing = threading.Event(), False
        self._thread: threading.Thread | None = None

    def sync(self) -> None:
        """Have what is new copied; returns at once."""
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Copy all there is, and wait for it; see `failed` for how it went."""
        if self._thread is None and not self._wanted.is_set() and not self._out_dir.is_dir():
            return
        self._closing = True
        self.sync()
        assert self._thread is not None
        self._thread.join()
        self._thread, self._closing = None, False

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                self.copy()
                self.failed = None
            except Exception as error:  # whatever it was, training is worth more than the copy
                self.failed = reason(error) if isinstance(error, OSError) else str(error)
                store.say(
                    f"the run was not copied to {self._place.root}: {self.failed}. "
                    "Training goes on; the next save tries again."
                )
            if self._closing and not self._wanted.is_set():
                return

    def copy(self) -> None:
        """Make the URL hold what the directory holds. Raises OSError of the store."""
        there = _steps(self._place)
        here = {path.name: path for path in store.complete(self._out_dir)}
        for name in sorted(there - here.keys()):
            # A run that went back to an earlier step must not find the later ones again.
            if here and name > max(here):
                self._remove(name)
        newest_first = sorted(here, reverse=True)
        for name in newest_first[: self._keep_last]:
            self._copy_checkpoint(here[name])
        self._copy_small()
        self._copy_final()
        kept = sorted((there | set(newest_first[: self._keep_last])), reverse=True)
        for name in kept[self._keep_last :]:
            if self._keep_every is None or store.step_of(name) % self._keep_every:
                self._remove(name)

    def _copy_checkpoint(self, path: Path) -> None:
        record = f"{path.name}/{store.RECORD_NAME}"
        try:
            content = (path / store.RECORD_NAME).read_bytes()
            if self._place.exists(record):
                if self._place.read(record) == content:
                    return
                self._remove(path.name)
            for name in json.loads(content)["files"]:
                self._place.copy_in(path / name, f"{path.name}/{name}")
        except FileNotFoundError:
            return  # it was retired meanwhile
        self._place.write(record, content)

    def _copy_small(self) -> None:
        for name in SMALL_FILES:
            if (self._out_dir / name).is_file():
                self._place.write(name, (self._out_dir / name).read_bytes())

    def _copy_final(self) -> None:
        mark = self._out_dir / FINAL / "training.json"
        if not mark.is_file():
            return
        if self._place.exists(f"{FINAL}/{mark.name}"):
            if self._place.read(f"{FINAL}/{mark.name}") == mark.read_bytes():
                return
            self._place.remove(FINAL)
        for file in sorted((self._out_dir / FINAL).rglob("*")):
            if file.is_file() and file != mark:
                self._place.copy_in(file, file.relative_to(self._out_dir).as_posix())
        self._place.write(f"{FINAL}/{mark.name}", mark.read_bytes())

    def _remove(self, name: str) -> None:
        self._place.remove(f"{name}/{store.RECORD_NAME}")
        self._place.remove(name)


def record_at(url: str) -> bytes | None:
    """The `run.yaml` of the run at a URL; None where there is none.

    Raises UserError for a URL that cannot be opened.
    """
    place = Storage(url)
    try:
        return place.read("run.yaml") if place.exists("run.yaml") else None
    except OSError as error:
        raise UserError(
            f"{url} cannot be read ({reason(error)}). Correct --remote_dir, or your access to it."
        ) from error


def fetch(url: str, out_dir: Path) -> Path | None:
    """Bring the newest checkpoint and the files of the run at `url` to a directory without one.

    None where there is no checkpoint. Several processes may ask: one brings it. Raises RunError
    when the store fails or what it gives is damaged.
    """
    place = Storage(url)
    try:
        names = sorted(_steps(place), reverse=True)
        if not names:
            return None
        target = out_dir / names[0]
        print(f"bringing {names[0]} from {url}")
        for left in out_dir.glob(f"step-*{_FETCHED}"):
            shutil.rmtree(left, ignore_errors=True)
        scrap = out_dir / f"{names[0]}{_FETCHED}"
        for entry in place.list(names[0]):
            file = scrap / entry.name.removeprefix(f"{names[0]}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            place.fetch(entry.name, file)
        store.verify(scrap)
        for name in SMALL_FILES:
            if place.exists(name):
                place.fetch(name, out_dir / name)
        scrap.rename(target)
    except OSError as error:
        raise RunError(
            f"the run could not be brought from {url} ({reason(error)}). Run the same command "
            "again, or give another --out_dir without --remote_dir to start afresh."
        ) from error
    return target


def clear(url: str) -> None:
    """Remove the run at a URL: its record, checkpoints and final model, and nothing else."""
    place = Storage(url)
    for name in (*SMALL_FILES, *_steps(place), FINAL):
        place.remove(name)


def _steps(place: Storage) -> set[str]:
    """Names of the checkpoints that are whole."""
    ends = f"/{store.RECORD_NAME}"
    found = {e.name.removesuffix(ends) for e in place.list() if e.name.endswith(ends)}
    return {name for name in found if store.is_step_name(name)}

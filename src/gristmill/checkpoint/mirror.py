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
                _remove(self._place, name)
        for number, name in enumerate(sorted(here, reverse=True)):
            if number < self._keep_last or self._is_kept(name):
                self._copy_checkpoint(here[name])
        self._copy_small()
        self._copy_final()
        # Of those that are there: one may have been retired while it was copied.
        for name in sorted(_steps(self._place), reverse=True)[self._keep_last :]:
            if not self._is_kept(name):
                _remove(self._place, name)

    def _is_kept(self, name: str) -> bool:
        return self._keep_every is not None and store.step_of(name) % self._keep_every == 0

    def _copy_checkpoint(self, path: Path) -> None:
        record = f"{path.name}/{store.RECORD_NAME}"
        try:
            content = (path / store.RECORD_NAME).read_bytes()
            if self._place.exists(record):
                if self._place.read(record) == content:
                    return
                _remove(self._place, path.name)
            for name in json.loads(content)["files"]:
                self._place.copy_in(path / name, f"{path.name}/{name}")
        except FileNotFoundError:
            _remove(self._place, path.name)  # it was retired meanwhile
            return
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
    """Bring the newest good checkpoint and the files of the run at `url` to a directory.

    None where there is no good one; a damaged one is passed over with a line. Raises RunError
    when the store fails.
    """
    place = Storage(url)
    try:
        for left in out_dir.glob(f"step-*{_FETCHED}"):
            shutil.rmtree(left, ignore_errors=True)
        for name in sorted(_steps(place), reverse=True):
            if _fetch_checkpoint(place, name, out_dir):
                for small in SMALL_FILES:
                    if place.exists(small):
                        place.fetch(small, out_dir / small)
                return out_dir / name
    except OSError as error:
        raise RunError(
            f"the run could not be brought from {url} ({reason(error)}). Run the same command "
            "again, or give another --out_dir without --remote_dir to start afresh."
        ) from error
    return None


def _fetch_checkpoint(place: Storage, name: str, out_dir: Path) -> bool:
    """Bring one checkpoint; False, and a line, for one that is damaged."""
    print(f"bringing {name} from {place.root}")
    scrap = out_dir / f"{name}{_FETCHED}"
    for entry in place.list(name):
        file = scrap / entry.name.removeprefix(f"{name}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        place.fetch(entry.name, file)
    try:
        store.verify(scrap)
    except RunError as error:
        store.say(f"{place.at(name)} is passed over: {error}")
        shutil.rmtree(scrap, ignore_errors=True)
        return False
    if (out_dir / name).is_dir():
        store.remove(out_dir / name)
    scrap.rename(out_dir / name)
    return True


def newest(url: str) -> int | None:
    """The step of the newest whole checkpoint at a URL."""
    return max(map(store.step_of, _steps(Storage(url))), default=None)


def clear(url: str) -> None:
    """Remove the run at a URL: its checkpoints, final model and, last, its record."""
    place = Storage(url)
    if record_at(url) is None:
        return  # what is there is not of a run
    for name in sorted(_steps(place)):
        _remove(place, name)
    for name in (FINAL, *reversed(SMALL_FILES)):
        place.remove(name)


def _remove(place: Storage, name: str) -> None:
    place.remove(f"{name}/{store.RECORD_NAME}")
    place.remove(name)


def _steps(place: Storage) -> set[str]:
    """Names of the checkpoints that are whole."""
    ends = f"/{store.RECORD_NAME}"
    found = {e.name.removesuffix(ends) for e in place.list() if e.name.endswith(ends)}
    return {name for name in found if store.is_step_name(name)}

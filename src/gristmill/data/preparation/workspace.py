"""The working directory of a preparation: `.prepare` inside the output, gone when it is finished.

    OUT/.prepare/plan.json        what is done here
    OUT/.prepare/job.json         its names, and the engine; written last: the job has begun
    OUT/.prepare/tokenizer/       the tokenizer of the job
    OUT/.prepare/tmp/             units being written
    OUT/.prepare/units/u-0000012  units that are done; a rename puts each there whole

Killing any process at any moment leaves whole units, and scraps in `tmp` that nobody reads.
On an object store, where nothing can be renamed, it is a little different: `object_workspace.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gristmill.data.preparation.plan import Plan
from gristmill.data.preparation.units import REJECTS, UnitRecord, read_record
from gristmill.data.storage import Storage, is_scrap
from gristmill.data.store import manifest
from gristmill.tokenizer.engines import EngineChoice
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

NAME = ".prepare"
JOB = ".job.json"
"""Beside a finished dataset: which job made it, as the inputs were then."""
SIDES = ("train", "val")
_OURS = {NAME, JOB, *SIDES, "tokenizer", "index.json", "chunks.npy", "README.md"}
_OURS |= {manifest.NAME, REJECTS}


class Workspace(ABC):
    """The places of one job in `out`. Cheap to make; nothing is there before `start`."""

    def __init__(self, out: Storage) -> None:
        self.out = out

    @staticmethod
    def open(out: Storage) -> Workspace:
        """The workspace of an output, whether or not a job has begun there."""
        if out.is_local:
            return LocalWorkspace(out)
        from gristmill.data.preparation.object_workspace import ObjectWorkspace

        return ObjectWorkspace(out)

    def start(self, plan: Plan, engine: EngineChoice, tokenizer: Tokenizer) -> None:
        """Begin a job. Of several that begin the same one at once the first one's engine counts."""
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            for path in sorted(Path(folder).iterdir()):
                self.out.write(f"{NAME}/tokenizer/{path.name}", path.read_bytes())
        text = json.dumps(plan.to_json(), separators=(",", ":"))
        self.out.write(f"{NAME}/plan.json", text.encode("utf-8", "surrogateescape"))
        value = {
            "hash": plan.hash,
            "job": plan.job,
            "units": len(plan.units),
            "engine": dataclasses.asdict(dataclasses.replace(engine, note="")),
        }
        self.out.create(f"{NAME}/job.json", json.dumps(value).encode())
        begun = self.stored()
        if begun is not None and begun["job"] != plan.job:
            raise UserError(
                f"another job began in {self.out.root} at the same moment, with other input or "
                "options. name another --output_dir."
            )

    def stored(self) -> dict[str, Any] | None:
        """Names of the job that has begun here and not finished: hash, job, units, engine."""
        try:
            value = json.loads(self.out.read(f"{NAME}/job.json"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        assert isinstance(value, dict)
        return value

    def engine(self) -> EngineChoice:
        """The engine of the job that has begun here."""
        value = self.stored()
        assert value is not None
        return EngineChoice(**value["engine"])

    def load(self) -> tuple[Plan, EngineChoice]:
        """The plan and the engine of the job that has begun here."""
        text = self.out.read(f"{NAME}/plan.json").decode("utf-8", "surrogateescape")
        return Plan.from_json(json.loads(text)), self.engine()

    @property
    @abstractmethod
    def tokenizer_dir(self) -> Path:
        """A local folder with the job's tokenizer."""

    @abstractmethod
    def locked(self, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Wait until nobody else works here (with `shared`: nobody who wants it alone).

        Two at once would write the same bytes; this only keeps them from doing the work twice.
        """

    @abstractmethod
    def committed(self) -> set[int]:
        """The units that are done."""

    def records(self, num_units: int) -> Iterator[UnitRecord]:
        """What units 0 to `num_units` - 1 hold, in order, a few at a time in memory."""
        return self.records_of(range(num_units))

    @abstractmethod
    def records_of(self, units: Iterable[int]) -> Iterator[UnitRecord]:
        """What these committed units hold, in the order asked for."""

    @abstractmethod
    def writing(self, unit: int, plan: Plan) -> contextlib.AbstractContextManager[Path]:
        """An empty local folder for `run_unit`; the unit is committed when the block ends well."""

    @abstractmethod
    def discard(self, unit: int) -> None:
        """Make a committed unit one that is still to be done."""

    @abstractmethod
    def rejects(self, unit: int) -> bytes:
        """The rejected documents that a committed unit lists, as JSON lines."""

    @abstractmethod
    def part(self, unit: int, name: str) -> Path:
        """A small part (`units.joins`) of a committed unit, as a local file."""

    @abstractmethod
    def place(self, unit: int, name: str, target: str) -> None:
        """Put a large part at `target`, a name below `out`; it may be there already."""

    @abstractmethod
    def scratch(self) -> Path:
        """A local folder for scraps, gone after `locked`."""

    @abstractmethod
    def wipe(self) -> None:
        """Remove all that an unfinished job left in `out`. Raises UserError for other things."""

    @abstractmethod
    def close(self) -> None:
        """Remove the working directory of a finished job, its name last."""


class LocalWorkspace(Workspace):
    """A workspace in a folder, perhaps one that several machines share."""

    def __init__(self, out: Storage) -> None:
        super().__init__(out)
        self._name = uuid.uuid4().hex[:12]

    @property
    def folder(self) -> Path:
        """The working directory."""
        return self.out.path / NAME

    @property
    def tokenizer_dir(self) -> Path:
        """The job's copy of the tokenizer."""
        return self.folder / "tokenizer"

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """As in `Workspace`; alone, it also clears what killed processes left."""
        file = self._lock(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            # On a file system without locks scraps are left: they may be somebody's.
            if file is not None and not shared:
                self._clear()
            yield
        finally:
            if file is not None:
                with file, contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._tidy()

    def _clear(self) -> None:
        """Remove scraps.

        The worker of a killed driver may still write there for a moment. Their name goes first, so
        that it cannot commit what is left of a unit half removed.
        """
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.folder / "tmp", self.folder / f"gone.{uuid.uuid4().hex[:12]}")
        for path in self.folder.glob("gone.*"):
            shutil.rmtree(path, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove scraps, and the whole directory where no job has begun or it is finished."""
        self._clear()
        if not (self.folder / "job.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _lock(self, how: int) -> IO[str] | None:
        """The locked file, to be closed; None where there are no locks."""
        told = False
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = (self.folder / "lock").open("a")
            except FileNotFoundError:
                continue  # somebody who finished removed the directory just now
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    print(f"another process is preparing {self.out.root}; waiting", file=sys.stderr)
                    told = True
                fcntl.flock(file, how)
            except OSError:
                file.close()
                return None
            # Whoever had it may have finished and removed the directory, the file with it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return file
            file.close()

    def unit_dir(self, unit: int) -> Path:
        """Where a unit is when it is done."""
        return self.folder / "units" / f"u-{unit:07d}"

    def committed(self) -> set[int]:
        """The units that are done."""
        try:
            return {int(name[2:]) for name in os.listdir(self.folder / "units")}
        except FileNotFoundError:
            return set()

    def records_of(self, units: Iterable[int]) -> Iterator[UnitRecord]:
        """What the units hold."""
        return (read_record(self.unit_dir(unit)) for unit in units)

    @contextlib.contextmanager
    def writing(self, unit: int, plan: Plan) -> Iterator[Path]:
        """An empty folder that becomes the unit's, whole, by a rename."""
        folder = self.folder / "tmp" / f"u-{unit:07d}.{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True)
        try:
            yield folder
            self.unit_dir(unit).parent.mkdir(exist_ok=True)
            _sync(folder)
            with contextlib.suppress(FileExistsError):
                _rename_new(folder, self.unit_dir(unit))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def discard(self, unit: int) -> None:
        """Forget a unit, at once by a rename."""
        going = self.folder / "tmp" / f"u-{unit:07d}.{uuid.uuid4().hex[:12]}"
        going.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.unit_dir(unit), going)
            shutil.rmtree(going, ignore_errors=True)

    def rejects(self, unit: int) -> bytes:
        """The rejected documents that a unit lists."""
        return (self.unit_dir(unit) / REJECTS).read_bytes()

    def part(self, unit: int, name: str) -> Path:
        """A part of a unit, where it is."""
        return self.unit_dir(unit) / name

    def place(self, unit: int, name: str, target: str) -> None:
        """Rename a part to its place, unless a killed process did so before."""
        path = self.out.path / target
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process did it just now
                os.replace(self.unit_dir(unit) / name, path)
        assert path.exists()

    def scratch(self) -> Path:
        """A folder of this process, on the output's own disk.

        Where there are no locks, another process may be at the same work: it has its own.
        """
        folder = self.folder / "tmp" / f"scraps.{self._name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def wipe(self) -> None:
        """Remove all that an unfinished job left in `out`, its name last; the lock stays."""
        check_replaceable(self.out)
        for folder, kept in ((self.out.path, {NAME}), (self.folder, {"lock", "job.json"})):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name in kept:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        (self.folder / "job.json").unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the working directory."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name != "job.json":
                self.out.remove(f"{NAME}/{path.name}")
        shutil.rmtree(self.folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring a directory's files to the disk: a machine that loses its power loses no unit."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a directory, or raise FileExistsError when the target is there (and as good)."""
    try:
        os.rename(source, target)
    except OSError:
        if target.is_dir():
            raise FileExistsError(target) from None
        raise


def is_unfinished(folder: Path) -> bool:
    """Whether a preparation has begun in `folder`, or writes it as one side of a split."""
    places = (folder, folder.parent) if folder.name in SIDES else (folder,)
    return any((place / NAME).exists() for place in places)


def datasets_in(out: Storage) -> dict[str, manifest.Manifest]:
    """The finished datasets of a job in `out`, by split name ("" when there is no split)."""
    found = {}
    for name in ("", *SIDES):
        place = out.below(name) if name else out
        if place.exists(manifest.NAME):
            found[name] = manifest.read(place.path if place.is_local else place)
    return found


def check_replaceable(out: Storage) -> None:
    """Raise UserError when `out` holds anything but what a preparation puts there."""
    if out.is_local:
        is_file = out.path.is_file()
        names = set(os.listdir(out.path)) if out.path.is_dir() else set()
    else:
        is_file, names = out.exists(""), {e.name.split("/")[0] for e in out.list()}
    others = sorted(
        n for n in names if n not in _OURS and not n.startswith("chunk-") and not is_scrap(n)
    )
    if others or is_file:
        raise UserError(
            f"{out.root} holds other things than a dataset ({', '.join(others[:4]) or 'a file'}). "
            "name an empty or new directory with --output_dir."
        )

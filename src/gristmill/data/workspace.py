"""The working directory of a preparation: `.prepare` inside the output, gone when it is finished.

    OUT/.prepare/plan.json        what is done here, and by which engine
    OUT/.prepare/tokenizer/       the tokenizer of the job
    OUT/.prepare/tmp/             units being written
    OUT/.prepare/units/u-0000012  units that are done; a rename puts each there whole

Killing any process at any moment leaves whole units, and scraps in `tmp` that nobody reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.data import manifest
from gristmill.data.plan import Plan
from gristmill.data.units import UnitRecord, read_record
from gristmill.tokenizer.engines import EngineChoice
from gristmill.util.errors import UserError

NAME = ".prepare"


@dataclass(frozen=True)
class Workspace:
    """The places of one job in `out`."""

    out: Path

    @property
    def folder(self) -> Path:
        """The working directory."""
        return self.out / NAME

    @property
    def tokenizer_dir(self) -> Path:
        """The job's copy of the tokenizer."""
        return self.folder / "tokenizer"

    def unit_dir(self, unit: int) -> Path:
        """Where a unit is when it is done."""
        return self.folder / "units" / f"u-{unit:07d}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until nobody else on this machine works here, and clear what killed processes left.

        Two at once would write the same bytes; this only keeps them from doing the work twice.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is preparing {self.out}; waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield  # a file system without locks: leave scraps, they may be somebody's
                return
            try:
                shutil.rmtree(self.folder / "tmp", ignore_errors=True)
                yield
            finally:
                shutil.rmtree(self.folder / "tmp", ignore_errors=True)

    def start(self, plan: Plan, engine: EngineChoice) -> None:
        """Make the directories; the plan is written last and says that they are there."""
        for name in ("tmp", "units"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        value = {
            "hash": plan.hash,
            "plan": plan.to_json(),
            "engine": dataclasses.asdict(dataclasses.replace(engine, note="")),
        }
        write_atomic(self.folder / "plan.json", json.dumps(value))

    def stored(self) -> dict[str, Any] | None:
        """What `start` wrote, as plain values; None when no job has begun here."""
        try:
            text = (self.folder / "plan.json").read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return None
        value = json.loads(text)
        assert isinstance(value, dict)
        return value

    def load(self) -> tuple[Plan, EngineChoice]:
        """The plan and the engine of the job that has begun here."""
        value = self.stored()
        assert value is not None
        return Plan.from_json(value["plan"]), EngineChoice(**value["engine"])

    def committed(self) -> set[int]:
        """The units that are done."""
        return {int(name[2:]) for name in os.listdir(self.folder / "units")}

    def record(self, unit: int) -> UnitRecord:
        """What a committed unit holds."""
        return read_record(self.unit_dir(unit))

    @contextlib.contextmanager
    def writing(self, unit: int) -> Iterator[Path]:
        """An empty directory that becomes the unit's, whole, when the block ends well."""
        folder = self.folder / "tmp" / f"u-{unit:07d}.{uuid.uuid4().hex[:12]}"
        folder.mkdir()
        try:
            yield folder
            with contextlib.suppress(FileExistsError):
                _rename_new(folder, self.unit_dir(unit))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def wipe(self) -> None:
        """Remove all that an unfinished job left in `out`; the lock stays."""
        check_replaceable(self.out)
        for folder, keep in ((self.out, NAME), (self.folder, "lock")):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name == keep:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def close(self) -> None:
        """Remove the working directory of a finished job, what says that there is one first."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a directory, or raise FileExistsError when the target is there (and as good)."""
    try:
        os.rename(source, target)
    except OSError:
        if target.is_dir():
            raise FileExistsError(target) from None
        raise


def write_atomic(path: Path, text: str) -> None:
    """Put `text` at `path` whole: readers see the old file or the new one."""
    scrap = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with scrap.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scrap, path)
    finally:
        scrap.unlink(missing_ok=True)


def datasets_in(out: Path) -> dict[str, manifest.Manifest]:
    """The finished datasets of a job in `out`, by split name ("" when there is no split)."""
    found = {}
    for name in ("", "train", "val"):
        if (out / name / manifest.NAME).is_file():
            found[name] = manifest.read(out / name)
    return found


def check_replaceable(out: Path) -> None:
    """Raise UserError when `out` holds anything but what a preparation puts there."""
    ours = {NAME, "train", "val", "tokenizer", "index.json", manifest.NAME, "rejects.jsonl"}
    others = [
        name
        for name in (sorted(os.listdir(out)) if out.is_dir() else [])
        if name not in ours and not name.startswith("chunk-")
    ]
    if others or out.is_file():
        raise UserError(
            f"{out} holds other things than a dataset ({', '.join(others[:4]) or 'a file'}). "
            "name an empty or new directory with --output_dir."
        )

"""The workspace on an object store: whole objects, visible by one PUT each, and no renames.

    OUT/.prepare/plan.json, job.json, tokenizer/       as in a folder
    OUT/.prepare/units/u-0000012.json                  the record of a unit, put last: it is done
    OUT/.prepare/rejects/u-0000012.jsonl               what it could not read, if anything
    OUT/.prepare/parts/u-0000012/train-0.bin           a small part, to be joined with others
    OUT/train/chunk-0000012-3.bin                      a large part, at its final place at once

A unit that is run twice puts equal objects twice; the record only where there is none.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gristmill.data.preparation.plan import Plan
from gristmill.data.preparation.units import RECORD, REJECTS, UnitRecord, chunk_name, joins
from gristmill.data.preparation.workspace import NAME, Workspace, check_replaceable
from gristmill.data.storage import Storage

# Small objects wait for the network, not for the processor.
_CONNECTIONS = 16


class ObjectWorkspace(Workspace):
    """A workspace on an object store; local folders for scraps are made when they are needed."""

    def __init__(self, out: Storage) -> None:
        super().__init__(out)
        self._local: tempfile.TemporaryDirectory[str] | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """A local copy of the job's tokenizer, fetched once."""
        folder = self.scratch() / "tokenizer"
        if not folder.is_dir():
            folder.mkdir()
            for entry in self.out.list(f"{NAME}/tokenizer"):
                self.out.fetch(entry.name, folder / Path(entry.name).name)
        return folder

    @contextlib.contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """No lock: whoever works here too writes the same objects. Scraps go at the end."""
        try:
            yield
        finally:
            if self._local is not None:
                self._local.cleanup()
                self._local = None

    def committed(self) -> set[int]:
        """The units that are done."""
        entries = self.out.list(f"{NAME}/units")
        return {int(Path(entry.name).stem[2:]) for entry in entries}

    def records_of(self, units: Iterable[int]) -> Iterator[UnitRecord]:
        """What the units hold, a few fetched ahead."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            ahead: deque[Future[UnitRecord]] = deque()
            for unit in units:
                ahead.append(pool.submit(self._record, unit))
                if len(ahead) >= 4 * _CONNECTIONS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _record(self, unit: int) -> UnitRecord:
        return UnitRecord.from_json(self.out.read(_record_name(unit)))

    @contextlib.contextmanager
    def writing(self, unit: int, plan: Plan) -> Iterator[Path]:
        """A local folder whose files are put on the store, the record last."""
        folder = Path(tempfile.mkdtemp(prefix=f"gristmill-u-{unit:07d}-"))
        try:
            yield folder
            self._commit(unit, plan, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, unit: int, plan: Plan, folder: Path) -> None:
        data = (folder / RECORD).read_bytes()
        record = UnitRecord.from_json(data)
        for split, held in zip(plan.recipe.splits, record.splits, strict=True):
            small = joins(held.parts, plan.recipe.chunk_tokens)
            for index, (part, joined) in enumerate(zip(held.parts, small, strict=True)):
                # Before the record that lists it: nobody sees a dataset before its manifest, and
                # another execution puts the same bytes under the same name.
                final = f"{split}/{chunk_name(unit, index)}".lstrip("/")
                name = _part_name(unit, part.name) if joined else final
                self.out.put(folder / part.name, name)
        if listed := (folder / REJECTS).read_bytes():
            self.out.write(_rejects_name(unit), listed)
        self.out.create(_record_name(unit), data)

    def discard(self, unit: int) -> None:
        """Forget a unit: its record goes, and the next attempt writes its parts again."""
        self.out.remove(_record_name(unit))

    def rejects(self, unit: int) -> bytes:
        """The rejected documents that a unit lists."""
        try:
            return self.out.read(_rejects_name(unit))
        except FileNotFoundError:
            return b""

    def part(self, unit: int, name: str) -> Path:
        """A small part, fetched."""
        path = self.scratch() / f"u-{unit:07d}-{name}"
        self.out.fetch(_part_name(unit, name), path)
        return path

    def place(self, unit: int, name: str, target: str) -> None:
        """Nothing: large parts are where they belong since their unit was committed."""

    def scratch(self) -> Path:
        """A temporary folder of this machine."""
        if self._local is None:
            self._local = tempfile.TemporaryDirectory(prefix="gristmill-prepare-")
        return Path(self._local.name)

    def wipe(self) -> None:
        """Remove all that an unfinished job left, its name last."""
        check_replaceable(self.out)
        for name in sorted({entry.name.split("/")[0] for entry in self.out.list()} - {NAME}):
            self.out.remove(name)
        self.close()

    def close(self) -> None:
        """Remove the working objects, the job's name last."""
        for name in ("plan.json", "tokenizer", "rejects", "parts", "units", "rejects.jsonl"):
            self.out.remove(f"{NAME}/{name}")
        self.out.remove(f"{NAME}/job.json")


def _record_name(unit: int) -> str:
    return f"{NAME}/units/u-{unit:07d}.json"


def _rejects_name(unit: int) -> str:
    return f"{NAME}/rejects/u-{unit:07d}.jsonl"


def _part_name(unit: int, name: str) -> str:
    return f"{NAME}/parts/u-{unit:07d}/{name}"

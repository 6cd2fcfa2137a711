"""Chunks of an object store on this machine's disk: fetched ahead, checked, and never too many.

    FOLDER/lock                    held for moments, by whoever changes what is in the folder
    FOLDER/readers/ID.json         when a reader will next use which chunk
    FOLDER/readers/ID.lock         held as long as that reader lives
    FOLDER/chunks/KEY              a whole chunk, checked against its digest
    FOLDER/chunks/KEY.part         a chunk on its way, at its full size, locked by who fetches it

All processes of a machine share the folder, and a chunk is fetched by one of them. Room is taken
before a download begins, so that the folder never holds more than its limit. What goes to make room
is the chunk whose next use, of all readers, is furthest away; what is fetched ahead never takes the
place of one that is needed before it. A chunk is opened under the lock and mapped, and a mapped
file stays readable, whoever removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import xxhash

from gristmill.data.chunks import ChunkRecord
from gristmill.data.storage import Storage
from gristmill.util.errors import RunError

_TRIES = 6
_FIRST_DELAY_S = 0.2
_POLL_S = 0.02
_BLOCK_BYTES = 4 << 20
_DOWNLOADS = 8
_NEVER = 2**62


@dataclass(frozen=True)
class Wanted:
    """A chunk of a dataset: where it is stored, what it must be, and its name in the cache."""

    storage: Storage
    record: ChunkRecord

    @property
    def key(self) -> str:
        """Name in the cache: equal chunks of any dataset are one file."""
        return self.record.xxh3


class ChunkCache:
    """A folder of chunks with a limit in bytes, shared by the processes of a machine.

    `open(wanted)` gives a chunk's file, fetched when it is not there; `ahead(...)` says what will
    be needed and fetches it in the background. Raises RunError when a chunk cannot be fetched, or
    is not what its manifest says however often it is.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.downloads = 0
        """Chunks that this process has fetched."""
        self._chunks, self._readers = folder / "chunks", folder / "readers"
        for path in (self._chunks, self._readers):
            path.mkdir(parents=True, exist_ok=True)
        self._name = uuid.uuid4().hex[:16]
        self._alive = _locked_file(self._readers / f"{self._name}.lock")
        self._pool = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="chunks")
        self._coming: dict[str, Future[None]] = {}
        self._next_use: dict[str, int] = {}
        self._guard = threading.Lock()

    def close(self) -> None:
        """Stop fetching; the chunks stay for the next reader."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for suffix in ("json", "lock"):
            (self._readers / f"{self._name}.{suffix}").unlink(missing_ok=True)
        self._alive.close()

    def ahead(self, coming: Sequence[Wanted], next_use: Mapping[str, int]) -> None:
        """Fetch these chunks, the first ones first, as far as there is room without one that is
        needed sooner. `next_use` tells for keys in how many samples this reader needs them."""
        with self._guard:
            self._next_use = dict(next_use)
        _write(self._readers / f"{self._name}.json", json.dumps(next_use))
        for key in [key for key, future in self._coming.items() if future.done()]:
            # What failed in the background is tried again, and told, when it is needed.
            del self._coming[key]
        for wanted in coming:
            if len(self._coming) >= 2 * _DOWNLOADS:
                return
            if wanted.key not in self._coming and not (self._chunks / wanted.key).exists():
                self._coming[wanted.key] = self._pool.submit(self._fetch_early, wanted)

    @contextlib.contextmanager
    def open(self, wanted: Wanted) -> Iterator[Path]:
        """A path that is the chunk's until the block ends; what is mapped then stays readable."""
        path = self._chunks / wanted.key
        while True:
            with self._locked():
                if path.exists():
                    yield path
                    return
            self._fetch(wanted, urgent=True)

    def _fetch_early(self, wanted: Wanted) -> None:
        with contextlib.suppress(RunError):
            self._fetch(wanted, urgent=False)

    def _fetch(self, wanted: Wanted, *, urgent: bool) -> None:
        """Bring a chunk, or wait while another process does; without room, only if `urgent`."""
        while not (self._chunks / wanted.key).exists():
            part = self._take_room(wanted, urgent=urgent)
            if part is not None:
                try:
                    self._download(wanted, part)
                finally:
                    with self._locked():
                        Path(part.name).unlink(missing_ok=True)
                    part.close()
                return
            if not urgent:
                return
            time.sleep(_POLL_S)

    def _take_room(self, wanted: Wanted, *, urgent: bool) -> IO[bytes] | None:
        """A file of the chunk's size to write it into; None when somebody else has it in hand or
        nothing may go that would make room."""
        path = self._chunks / f"{wanted.key}.part"
        with self._locked():
            if (self._chunks / wanted.key).exists():
                return None
            sizes = {p.name: p.stat().st_size for p in self._chunks.iterdir()}
            if path.name in sizes:
                if _is_locked(path):
                    return None
                path.unlink(missing_ok=True)  # its writer died
                del sizes[path.name]
            if not self._make_room(wanted, sizes, urgent=urgent):
                return None
            part = _locked_file(path)
            part.truncate(wanted.record.bytes)
            return part

    def _make_room(self, wanted: Wanted, sizes: dict[str, int], *, urgent: bool) -> bool:
        """Remove chunks until the wanted one fits; nothing if that takes one needed sooner.

        What is needed now may take the place of anything: there is always a next step.
        """
        excess = sum(sizes.values()) + wanted.record.bytes - self.max_bytes
        if excess <= 0:
            return True
        next_use = self._next_uses()
        mine = -1 if urgent else next_use.get(wanted.key, _NEVER - 1)
        whole = [name for name in sizes if not name.endswith(".part")]
        leaving = []
        for name in sorted(whole, key=lambda n: -next_use.get(n, _NEVER)):
            if next_use.get(name, _NEVER) <= mine:
                break
            leaving.append(name)
            excess -= sizes[name]
            if excess <= 0:
                for going in leaving:
                    (self._chunks / going).unlink(missing_ok=True)
                return True
        # Parts that nobody writes any more are in the way too.
        dead = [n for n in sizes if n.endswith(".part") and not _is_locked(self._chunks / n)]
        for name in dead:
            (self._chunks / name).unlink(missing_ok=True)
        return bool(dead) and self._make_room(
            wanted, {n: s for n, s in sizes.items() if n not in dead}, urgent=urgent
        )

    def _next_uses(self) -> dict[str, int]:
        """The soonest use of each chunk by any living reader; also forgets those that died."""
        soonest: dict[str, int] = {}
        for lock in self._readers.glob("*.lock"):
            told = lock.with_suffix(".json")
            if lock.stem != self._name and not _is_locked(lock):
                lock.unlink(missing_ok=True)
                told.unlink(missing_ok=True)
                continue
            uses = self._next_use if lock.stem == self._name else _read(told)
            for key, position in uses.items():
                soonest[key] = min(position, soonest.get(key, _NEVER))
        return soonest

    def _download(self, wanted: Wanted, part: IO[bytes]) -> None:
        where = wanted.storage.at(wanted.record.name)
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_FIRST_DELAY_S * 2 ** (attempt - 1))
            try:
                with wanted.storage.open(wanted.record.name) as source:
                    problem = _copied(source, part, wanted.record)
            except FileNotFoundError:
                raise RunError(
                    f"{where} is missing. copy it there again, or prepare the dataset again."
                ) from None
            except Exception as error:  # whatever the store's library raises
                problem = f"{type(error).__name__}: {error}"
            if not problem:
                with self._locked():
                    os.replace(part.name, self._chunks / wanted.key)
                self.downloads += 1
                return
        raise RunError(
            f"{where} could not be read ({_TRIES} tries; {problem}). check the connection with "
            f"`gristmill data verify {wanted.storage.root}`, or copy the chunk there again."
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _copied(source: BinaryIO, part: IO[bytes], record: ChunkRecord) -> str:
    """Copy a chunk; what is wrong with it, empty when it is the one of the record."""
    digest, size = xxhash.xxh3_128(), 0
    part.seek(0)
    while size <= record.bytes and (block := source.read(_BLOCK_BYTES)):
        digest.update(block)
        size += len(block)
        if size <= record.bytes:
            part.write(block)
    part.flush()
    if size != record.bytes:
        return f"it has {size:,} bytes, its manifest says {record.bytes:,}"
    if digest.hexdigest() != record.xxh3:
        return "its contents are not those of its manifest"
    return ""


def _locked_file(path: Path) -> IO[bytes]:
    """A new file that is locked until it is closed, also by the end of the process."""
    file = path.open("w+b")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _write(path: Path, text: str) -> None:
    scrap = path.with_suffix(".tmp")
    scrap.write_text(text)
    os.replace(scrap, path)


def _read(path: Path) -> dict[str, int]:
    try:
        uses: dict[str, int] = json.loads(path.read_text())
        return uses
    except (FileNotFoundError, ValueError):
        return {}

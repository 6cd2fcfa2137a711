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
import errno
import fcntl
import json
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash

from gristmill.data.storage import Storage
from gristmill.data.store.chunks import ChunkRecord
from gristmill.util.errors import RunError

# Tries to fetch a chunk ahead, and one that is needed now: those outlast 100 s of a store that does
# not answer. What has come wrong so many times is wrong there.
_TRIES, _URGENT_TRIES, _WRONG_TRIES = 6, 10, 4
_FIRST_DELAY_S = 0.2
_POLL_S = 0.02
_BLOCK_BYTES = 4 << 20
_DOWNLOADS = 8
_NEVER = 2**62
# How often a reader tells the others what it needs, looks again whether a chunk is still there, and
# tries again to find room for one. Training asks for the next batch many times in between.
_TELL_S, _SEEN_S, _NO_ROOM_S = 0.02, 0.5, 0.05
# How long the end of a process waits for what is on its way.
_END_S = 1.0
_IN_HAND, _NO_ROOM = "in hand", "no room"


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
    be needed and fetches it in the background. `ahead_bytes` is how much of it is looked at in
    advance: the whole limit unless given. Of several readers, the largest limit holds. Raises
    RunError when a chunk cannot be fetched, or is not what its manifest says however often it is.
    """

    def __init__(self, folder: Path, max_bytes: int, *, ahead_bytes: int | None = None) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.ahead_bytes = max_bytes if ahead_bytes is None else min(ahead_bytes, max_bytes)
        self.downloads = 0
        """Chunks that this process has fetched."""
        self._chunks, self._readers = folder / "chunks", folder / "readers"
        for path in (self._chunks, self._readers):
            path.mkdir(parents=True, exist_ok=True)
        self._name = uuid.uuid4().hex[:16]
        self._sizes: dict[str, int] = {}
        self._seen: dict[str, float] = {}
        self._share, self._told_at = 1.0, 0.0
        self._uses: dict[str, int] = {}
        self._told_keys: Mapping[str, int] = {}
        with self._locked():
            # Under the lock, since a file that nobody holds is taken for that of a dead reader.
            alive = _locked_file(self._readers / f"{self._name}.lock")
            self._tell()
            self._trim()
        self._todo = _Todo()
        reader = self._readers / self._name
        self._end = weakref.finalize(self, _end, self._todo, reader, alive, os.getpid())

    def close(self) -> None:
        """Stop fetching; the chunks stay for the next reader. The end of the process does it too,
        and waits for no store that does not answer."""
        self._end()

    def ahead(self, coming: Sequence[Wanted], next_use: Mapping[str, int]) -> None:
        """Fetch these chunks, the first ones first, as far as there is room without one that is
        needed sooner. `next_use` tells for keys in how many samples this reader needs them."""
        self._uses = dict(next_use)
        now, missing = time.monotonic(), []
        if now - self._told_at > _TELL_S:
            self._tell()
        room = self._share * self.max_bytes
        for wanted in coming:
            room -= wanted.record.bytes
            if room < 0:
                break
            if now - self._seen.get(wanted.key, 0) > _SEEN_S:
                missing.append(wanted)
        if any(wanted.key not in self._told_keys for wanted in missing):
            self._tell()  # what comes must not look to others as if nobody needed it
        if missing:
            self._todo.put(missing, weakref.ref(self))

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

    def fetch_early(self, wanted: Wanted) -> bool:
        """Fetch a chunk if there is room for it; whether there was."""
        with contextlib.suppress(RunError, OSError):  # told when the chunk is needed
            return self._fetch(wanted, urgent=False)
        return True

    def _fetch(self, wanted: Wanted, *, urgent: bool) -> bool:
        """Bring a chunk, or wait while another does; False without room, only if not `urgent`."""
        path = self._chunks / wanted.key
        if wanted.record.bytes > self.max_bytes:
            raise RunError(
                f"{wanted.storage.at(wanted.record.name)} has {wanted.record.bytes:,} bytes, more "
                f"than the cache in {self.folder} may hold ({self.max_bytes:,}). give it more: "
                "--data.cache_gb"
            )
        while not path.exists():
            part = self._take_room(wanted, urgent=urgent)
            if isinstance(part, str):
                if not urgent:
                    return part == _IN_HAND
                time.sleep(_POLL_S)
                continue
            try:
                self._download(wanted, part, urgent=urgent)
            except BaseException:
                # Only then: a part of that name that is there after success is somebody else's.
                with self._locked():
                    Path(part.name).unlink(missing_ok=True)
                raise
            finally:
                part.close()
            break
        self._seen[wanted.key] = time.monotonic()
        return True

    def _take_room(self, wanted: Wanted, *, urgent: bool) -> IO[bytes] | str:
        """A file of the chunk's size to write it into, or why there is none: somebody else has the
        chunk in hand, or nothing may go that would make room."""
        path = self._chunks / f"{wanted.key}.part"
        with self._locked():
            if (self._chunks / wanted.key).exists() or _is_locked(path):
                return _IN_HAND
            if not self._make_room(wanted, urgent=urgent):
                return _NO_ROOM
            part = _locked_file(path)
            part.truncate(wanted.record.bytes)
            return part

    def _make_room(self, wanted: Wanted, *, urgent: bool) -> bool:
        """Remove chunks until the wanted one fits; nothing if that takes one needed sooner.

        What is needed now may take the place of anything: there is always a next step.
        """
        sizes = self._held()
        sizes.pop(f"{wanted.key}.part", None)  # of a writer that died
        excess = sum(sizes.values()) + wanted.record.bytes - self.max_bytes
        if excess <= 0:
            return True
        told = self._told()
        excess -= max(reader["limit"] for reader in told) - self.max_bytes
        uses = _soonest(told)
        mine = -1 if urgent else uses.get(wanted.key, _NEVER - 1)
        leaving = []
        for name in _furthest_first(sizes, uses):
            if excess <= 0 or _when(name, uses) <= mine:
                break
            if not name.endswith(".part") or not _is_locked(self._chunks / name):
                leaving.append(name)
                excess -= sizes[name]
        if excess > 0:
            return False
        self._remove(leaving)
        return True

    def _trim(self) -> None:
        """Remove what earlier readers left here: half fetched, or over the limit."""
        sizes, told = self._held(), self._told()
        excess = sum(sizes.values()) - max(reader["limit"] for reader in told)
        uses, leaving = _soonest(told), []
        for name in _furthest_first(sizes, uses):
            half = name.endswith(".part")
            if (half or excess > 0) and not (half and _is_locked(self._chunks / name)):
                leaving.append(name)
                excess -= sizes[name]
        self._remove(leaving)

    def _held(self) -> dict[str, int]:
        """Every file of the folder and its size, which a name never changes."""
        known, self._sizes = self._sizes, {}
        for name in os.listdir(self._chunks):
            size = known.get(name)
            self._sizes[name] = (self._chunks / name).stat().st_size if size is None else size
        return dict(self._sizes)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self._chunks / name).unlink(missing_ok=True)
            self._seen.pop(name, None)

    def _tell(self) -> None:
        """Write down what this reader needs, for the others, and see how many they are."""
        self._told_at, self._told_keys = time.monotonic(), self._uses
        about = {"limit": self.max_bytes, "ahead": self.ahead_bytes, "uses": self._uses}
        _write(self._readers / f"{self._name}.json", json.dumps(about))
        views = [told["ahead"] for told in self._told(forget=False)]
        # All that all readers fetch ahead fits at once, or they would take it from each other.
        self._share = self.ahead_bytes / max(1, sum(views))

    def _told(self, *, forget: bool = True) -> list[dict[str, Any]]:
        """What each living reader needs, this one first. Those that died are forgotten, which is
        for who holds the lock: a reader that begins does not hold its own yet."""
        found = [{"limit": self.max_bytes, "ahead": self.ahead_bytes, "uses": self._uses}]
        for lock in self._readers.glob("*.lock"):
            if lock.stem == self._name:
                continue
            if _is_locked(lock):
                found.append(
                    {"limit": 0, "ahead": 0, "uses": {}} | _read(lock.with_suffix(".json"))
                )
            elif forget:
                _forget(lock.with_suffix(""))
        return found

    def _download(self, wanted: Wanted, part: IO[bytes], *, urgent: bool) -> None:
        where = wanted.storage.at(wanted.record.name)
        problem, wrong = "", 0
        for attempt in range(_URGENT_TRIES if urgent else _TRIES):
            if attempt and self._todo.closed.wait(_FIRST_DELAY_S * 2 ** (attempt - 1)):
                raise RunError(f"{where} was not read: the cache was closed. open it again.")
            try:
                with wanted.storage.open(wanted.record.name) as source:
                    problem = _copied(source, part, wanted.record)
                wrong += problem != ""
            except FileNotFoundError:
                raise RunError(
                    f"{where} is missing. copy it there again, or prepare the dataset again."
                ) from None
            except Exception as error:  # whatever the store's library raises
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise RunError(
                        f"the disk of {self.folder} is full. make room there, or give less of it "
                        "or another one to chunks: --data.cache_gb, --data.cache_dir"
                    ) from error
                problem = f"{type(error).__name__}: {error}"
                wrong += isinstance(error, PermissionError)
            if wrong == _WRONG_TRIES:
                break
            if not problem:
                os.fsync(part.fileno())  # a power failure must not leave an empty file there
                with self._locked():
                    os.replace(part.name, self._chunks / wanted.key)
                    self.downloads += 1
                return
        raise RunError(
            f"{where} could not be read ({attempt + 1} tries; {problem}). see what else is wrong "
            f"with `gristmill data verify {wanted.storage.root}`, copy the chunk there again, and "
            "run the command again: it goes on."
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def bytes_in(folder: Path) -> int:
    """Bytes of the chunks in a cache's folder, which need not exist."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder / "chunks") as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another reader made room
                total += entry.stat().st_size
    return total


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


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        return told
    except (FileNotFoundError, ValueError):
        return {}


def _forget(reader: Path) -> None:
    """Remove the files of a reader that is gone."""
    for suffix in (".json", ".tmp", ".lock"):
        reader.with_suffix(suffix).unlink(missing_ok=True)


def _soonest(told: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The soonest use of each chunk by any reader."""
    soonest: dict[str, int] = {}
    for reader in told:
        for key, position in reader["uses"].items():
            soonest[key] = min(position, soonest.get(key, _NEVER))
    return soonest


def _furthest_first(names: Iterable[str], uses: Mapping[str, int]) -> Iterator[str]:
    """Files of the folder in the order in which they may go. Only those in need are sorted: there
    may be very many of the others."""
    halves = [name for name in names if name.endswith(".part")]
    yield from halves
    yield from (name for name in names if name not in uses and not name.endswith(".part"))
    yield from sorted((name for name in names if name in uses), key=lambda n: -uses[n])


def _when(name: str, uses: Mapping[str, int]) -> int:
    """When a file of the folder is needed; one half fetched, whose writer may be dead, first goes
    if it is."""
    return _NEVER + 1 if name.endswith(".part") else uses.get(name, _NEVER)


class _Todo:
    """Chunks to fetch ahead, the first ones first, and the threads that do.

    They are daemons: a process that ends does not wait for a store.
    """

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._change = threading.Condition()
        self._wanted: deque[Wanted] = deque()
        self._busy: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._full_until = 0.0

    def put(self, wanted: Sequence[Wanted], cache: weakref.ref[ChunkCache]) -> None:
        """Fetch these, and no longer what was asked for before."""
        with self._change:
            if self.closed.is_set() or time.monotonic() < self._full_until:
                return
            self._wanted = deque(w for w in wanted if w.key not in self._busy)
            while len(self._threads) < min(_DOWNLOADS, len(self._wanted)):
                name = f"chunks-{len(self._threads)}"
                new = threading.Thread(target=self._work, args=(cache,), name=name, daemon=True)
                self._threads.append(new)
                new.start()
            self._change.notify(len(self._wanted))

    def idle(self) -> bool:
        """Whether nothing is being fetched or waits for it."""
        with self._change:
            return not self._wanted and not self._busy

    def close(self) -> None:
        """Stop; what is on its way is given up soon."""
        with self._change:
            self.closed.set()
            self._wanted.clear()
            self._change.notify_all()
        until = time.monotonic() + _END_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _work(self, cache_of: weakref.ref[ChunkCache]) -> None:
        while (wanted := self._take()) is not None:
            room, cache = True, cache_of()
            try:
                if cache is not None:
                    room = cache.fetch_early(wanted)
            finally:
                del cache  # or it would never be garbage
                self._done(wanted, room=room)

    def _take(self) -> Wanted | None:
        with self._change:
            while not self.closed.is_set():
                if self._wanted:
                    wanted = self._wanted.popleft()
                    self._busy.add(wanted.key)
                    return wanted
                self._change.wait()
        return None

    def _done(self, wanted: Wanted, *, room: bool) -> None:
        with self._change:
            self._busy.discard(wanted.key)
            if not room:
                self._wanted.clear()
                self._full_until = time.monotonic() + _NO_ROOM_S


def _end(todo: _Todo, reader: Path, alive: IO[bytes], pid: int) -> None:
    """What is left to do when nobody uses a cache any more; a forked process uses its parent's."""
    if os.getpid() != pid:
        return
    todo.close()
    _forget(reader)
    alive.close()

"""Chunks come once, whole and in time, whatever the store does; the folder keeps its limit."""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gristmill.data.reading import chunk_cache
from gristmill.data.reading.chunk_cache import ChunkCache, Wanted
from gristmill.data.storage import Storage
from gristmill.data.store.chunks import map_chunk, write_chunk
from gristmill.util.errors import RunError

TOKENS = 500


class Faulty(Storage):
    """A folder whose files are read with faults: a list of them for each name, used up in turn."""

    def __init__(self, root, faults=None, delay_s=0.0):
        super().__init__(root)
        self.faults, self.delay_s = faults or {}, delay_s
        self.opened = []

    def open(self, name):
        self.opened.append(name)
        time.sleep(self.delay_s)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault == "503":
            raise OSError("503 Slow Down")
        return FaultyFile(super().open(name), fault)


class FaultyFile:
    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, size):
        data = self.file.read(size)
        if self.fault == "truncated" and data:
            return data[: len(data) // 2] if len(data) > 100 else b""
        if self.fault == "corrupt" and data:
            return data[:-1] + bytes([data[-1] ^ 1])
        return data


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    made = []
    for number in range(8):
        tokens = np.full(TOKENS, number, dtype=np.uint16)
        lengths = np.array([TOKENS], dtype=np.int64)
        made.append(write_chunk(folder / f"chunk-{number}.bin", [tokens], lengths, "uint16"))
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chunk_cache, "_FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(chunk_cache, "_NO_ROOM_S", 0.0)
    monkeypatch.setattr(chunk_cache, "_TELL_S", 0.0)


def first_token(cache, wanted):
    with cache.open(wanted) as path:
        return int(map_chunk(path, wanted.record, "uint16").tokens[0])


def cache_of(tmp_path, chunks, records):
    return ChunkCache(tmp_path / "cache", chunks * records[0].bytes)


def held(tmp_path):
    return {p.name for p in (tmp_path / "cache" / "chunks").iterdir()}


def test_a_chunk_is_fetched_once_and_read_many_times(tmp_path, records):
    store = Faulty(tmp_path / "store")
    cache = cache_of(tmp_path, 8, records)
    wanted = [Wanted(store, r) for r in records]
    for _ in range(3):
        assert [first_token(cache, w) for w in wanted] == list(range(8))
    assert sorted(store.opened) == [r.name for r in records]
    cache.close()
    again = cache_of(tmp_path, 8, records)
    assert first_token(again, wanted[3]) == 3
    assert len(store.opened) == 8
    again.close()


def test_what_another_fetches_again_is_left_to_it(tmp_path, records, monkeypatch):
    cache = cache_of(tmp_path, 8, records)
    wanted = Wanted(Storage(tmp_path / "store"), records[0])
    part = tmp_path / "cache" / "chunks" / f"{wanted.key}.part"
    download = cache._download

    def download_and_more(*args, **options):
        download(*args, **options)
        part.write_bytes(b"another's, since the chunk had to go at once")

    monkeypatch.setattr(cache, "_download", download_and_more)
    assert cache.fetch_early(wanted)
    assert part.exists()
    cache.close()


def test_faults_of_the_store_are_tried_again(tmp_path, records):
    faults = {r.name: ["503", "truncated", "corrupt"] for r in records}
    store = Faulty(tmp_path / "store", faults)
    cache = cache_of(tmp_path, 8, records)
    assert [first_token(cache, Wanted(store, r)) for r in records] == list(range(8))
    assert len(store.opened) == 4 * 8
    cache.close()


@pytest.mark.parametrize("fault", ["503", "truncated", "corrupt"])
def test_a_fault_that_stays_is_told(tmp_path, records, fault):
    store = Faulty(tmp_path / "store", {records[0].name: [fault] * 99})
    cache = cache_of(tmp_path, 8, records)
    with pytest.raises(RunError, match="could not be read"):
        first_token(cache, Wanted(store, records[0]))
    assert held(tmp_path) == set()
    os.unlink(tmp_path / "store" / records[1].name)
    with pytest.raises(RunError, match="is missing"):
        first_token(cache, Wanted(store, records[1]))
    assert first_token(cache, Wanted(store, records[2])) == 2
    cache.close()


def test_what_is_needed_last_goes_first(tmp_path, records):
    store = Storage(tmp_path / "store")
    cache = cache_of(tmp_path, 3, records)
    wanted = [Wanted(store, r) for r in records]
    for w in wanted[:3]:
        first_token(cache, w)
    cache.ahead([], {wanted[0].key: 5, wanted[1].key: 900, wanted[2].key: 7, wanted[3].key: 0})
    first_token(cache, wanted[3])
    assert held(tmp_path) == {wanted[n].key for n in (0, 2, 3)}
    # Fetched ahead, a chunk takes no place of one that is needed sooner.
    uses = {wanted[0].key: 5, wanted[2].key: 7, wanted[3].key: 9, wanted[4].key: 50}
    cache.ahead([wanted[4]], uses)
    settle(cache)
    assert held(tmp_path) == {wanted[n].key for n in (0, 2, 3)}
    cache.ahead([wanted[4]], uses | {wanted[2].key: 70})
    settle(cache)
    assert held(tmp_path) == {wanted[n].key for n in (0, 3, 4)}
    cache.close()


def settle(cache):
    while not cache._todo.idle():
        time.sleep(0.001)


def test_another_readers_needs_count_until_it_dies(tmp_path, records):
    store = Storage(tmp_path / "store")
    wanted = [Wanted(store, r) for r in records]
    cache, other = cache_of(tmp_path, 2, records), cache_of(tmp_path, 2, records)
    first_token(cache, wanted[0])
    first_token(cache, wanted[1])
    other.ahead([], {wanted[0].key: 3})
    cache.ahead([wanted[2]], {wanted[0].key: 999, wanted[1].key: 888, wanted[2].key: 10})
    settle(cache)
    assert held(tmp_path) == {wanted[0].key, wanted[2].key}
    # As after kill -9: the lock is gone, the file with its needs is still there.
    other._end.peek()[2][2].close()
    cache.ahead([wanted[3]], {wanted[2].key: 5, wanted[3].key: 10})
    settle(cache)
    assert held(tmp_path) == {wanted[2].key, wanted[3].key}
    cache.close()


def test_a_part_whose_writer_died_is_no_obstacle(tmp_path, records):
    store = Storage(tmp_path / "store")
    cache = cache_of(tmp_path, 1, records)
    chunks = tmp_path / "cache" / "chunks"
    for record in records[:2]:
        (chunks / f"{record.xxh3}.part").write_bytes(b"\0" * record.bytes)
    assert first_token(cache, Wanted(store, records[0])) == 0
    assert held(tmp_path) == {records[0].xxh3}
    cache.close()


def test_the_limit_is_kept_while_many_readers_read(tmp_path, records):
    store = Faulty(tmp_path / "store", delay_s=0.002)
    wanted = [Wanted(store, r) for r in records]
    limit, largest, stop = 3 * records[0].bytes, [0], threading.Event()
    chunks = cache_of(tmp_path, 3, records)._chunks

    def watch():
        while not stop.is_set():
            total = 0
            for entry in os.scandir(chunks):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
            largest[0] = max(largest[0], total)

    def read(seed):
        cache = cache_of(tmp_path, 3, records)
        for number in np.random.default_rng(seed).integers(0, 8, 30).tolist():
            cache.ahead(wanted, {w.key: (n - number) % 8 for n, w in enumerate(wanted)})
            assert first_token(cache, wanted[number]) == number
        cache.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(3) as pool:
        finished = [pool.submit(read, seed) for seed in range(3)]
    stop.set()
    watcher.join()
    for reader in finished:
        reader.result()
    assert 0 < largest[0] <= limit


def test_of_two_limits_the_larger_holds_while_its_reader_lives(tmp_path, records):
    store = Storage(tmp_path / "store")
    wanted = [Wanted(store, r) for r in records]
    large, small = cache_of(tmp_path, 4, records), cache_of(tmp_path, 1, records)
    for w in wanted[:3]:
        first_token(large, w)
    first_token(small, wanted[3])
    assert held(tmp_path) == {w.key for w in wanted[:4]}
    large.close()
    first_token(small, wanted[4])
    assert held(tmp_path) == {wanted[4].key}
    small.close()


def test_what_an_earlier_reader_left_over_the_limit_goes(tmp_path, records):
    store = Storage(tmp_path / "store")
    earlier = cache_of(tmp_path, 8, records)
    for r in records:
        first_token(earlier, Wanted(store, r))
    earlier.close()
    assert len(held(tmp_path)) == 8
    cache_of(tmp_path, 3, records).close()
    assert len(held(tmp_path)) == 3


def test_readers_fetch_no_more_ahead_than_fits_for_all(tmp_path, records):
    store = Storage(tmp_path / "store")
    wanted = [Wanted(store, r) for r in records]
    first, second = cache_of(tmp_path, 4, records), cache_of(tmp_path, 4, records)
    uses = [{w.key: n for n, w in enumerate(part)} for part in (wanted[:4], wanted[4:])]
    for _ in range(3):
        first.ahead(wanted[:4], uses[0])
        second.ahead(wanted[4:], uses[1])
        settle(first)
        settle(second)
    assert held(tmp_path) == {w.key for w in (wanted[0], wanted[1], wanted[4], wanted[5])}
    assert first.downloads == second.downloads == 2
    first.close()
    second.close()


def test_a_chunk_larger_than_the_cache_is_no_endless_wait(tmp_path, records):
    cache = ChunkCache(tmp_path / "cache", records[0].bytes - 1)
    with pytest.raises(RunError, match="cache_gb"):
        first_token(cache, Wanted(Storage(tmp_path / "store"), records[0]))
    cache.close()


def test_a_full_disk_is_told_at_once(tmp_path, records, monkeypatch):
    store = Faulty(tmp_path / "store")
    cache = cache_of(tmp_path, 8, records)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chunk_cache, "_copied", full)
    with pytest.raises(RunError, match="is full"):
        first_token(cache, Wanted(store, records[0]))
    assert len(store.opened) == 1
    cache.close()


def test_a_cache_that_nobody_has_any_more_ends_its_threads(tmp_path, records):
    cache = cache_of(tmp_path, 8, records)
    wanted = [Wanted(Storage(tmp_path / "store"), r) for r in records]
    cache.ahead(wanted, {w.key: n for n, w in enumerate(wanted)})
    settle(cache)
    threads = list(cache._todo._threads)
    assert len(threads) == 8
    assert len(list((tmp_path / "cache" / "readers").iterdir())) == 2
    del cache
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    assert not list((tmp_path / "cache" / "readers").iterdir())


_DEAD_STORE = """
import sys, threading, time
from gristmill.data.reading.chunk_cache import ChunkCache, Wanted
from gristmill.data.store.chunks import ChunkRecord
from gristmill.data.storage import Storage
from pathlib import Path

class Dead(Storage):
    def open(self, name):
        print("asked", flush=True)
        threading.Event().wait()

cache = ChunkCache(Path(sys.argv[1]), 10**6)
coming = [Wanted(Dead("nowhere"), ChunkRecord(f"c{n}", 1, 1, 100, f"{n:032x}")) for n in range(30)]
cache.ahead(coming, {w.key: 0 for w in coming})
time.sleep(0.2)
"""


def test_a_process_that_ends_waits_for_no_store(tmp_path):
    command = [sys.executable, "-c", _DEAD_STORE, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.count("asked") == 8
    assert not done.stderr
    assert not list((tmp_path / "cache" / "readers").iterdir())
    # What it had in hand is in nobody's way.
    again = ChunkCache(tmp_path / "cache", 10**6)
    assert not list((tmp_path / "cache" / "chunks").iterdir())
    again.close()


def _read_all(store, folder, size, records, log, barrier):
    cache = ChunkCache(folder, size)
    barrier.wait()
    wanted = [Wanted(Faulty(store, delay_s=0.01), r) for r in records]
    cache.ahead(wanted, {w.key: n for n, w in enumerate(wanted)})
    assert [first_token(cache, w) for w in wanted] == list(range(len(records)))
    log.write_text(json.dumps(cache.downloads))
    cache.close()


@pytest.mark.slow
def test_two_processes_fetch_each_chunk_once(tmp_path, records):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    logs = [tmp_path / f"{n}.json" for n in range(2)]
    shared = (tmp_path / "store", tmp_path / "cache", 8 * records[0].bytes, records)
    processes = [spawn.Process(target=_read_all, args=(*shared, log, barrier)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sum(json.loads(log.read_text()) for log in logs) == 8

# ruff: noqa: F811  (fixtures are imported)
"""Storage that fails in the middle: full disks, lost connections, races; and an object store.

Everywhere: nothing half-made is ever taken for done, the message says what to do, and the same
command finishes with the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest

from gristmill.data.preparation import object_workspace, status
from gristmill.data.preparation.executors import Task, local, work
from gristmill.data.preparation.executors.work import Work
from gristmill.data.preparation.object_workspace import ObjectWorkspace
from gristmill.data.preparation.units import Progress
from gristmill.data.preparation.workspace import NAME, LocalWorkspace
from gristmill.data.storage import Storage
from gristmill.util.errors import RunError, UserError

from .conftest import make_text, tree
from .s3 import bucket, s3_server, stored, upload  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_units")

OPTIONS = {"val_fraction": 0.1, "chunk_tokens": 2000}


@pytest.fixture
def novels(tmp_path):
    """Five text files in two folders, about 40 kB."""
    root = tmp_path / "novels"
    for number in range(5):
        path = root / ("a" if number % 2 else "b/c") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_text(number, 700 + 400 * number), encoding="utf-8")
    return root


@pytest.fixture
def expected(novels, tmp_path, run_prepare, small_units):
    """The files that an undisturbed local preparation of the novels makes."""
    return tree(run_prepare("textfiles", novels, tmp_path / "expected", **OPTIONS))


def objects(url):
    return {name for name in stored(url) if NAME in name}


def test_the_same_bytes_from_and_to_an_object_store(novels, expected, bucket, run_prepare):
    source = upload(novels, f"{bucket}/text")
    run_prepare("textfiles", source, f"{bucket}/out", **OPTIONS)
    assert stored(f"{bucket}/out") == expected
    assert len([name for name in expected if name.endswith(".bin")]) > 6
    assert len(json.loads(expected["train/manifest.json"])["source"]["inputs"]) == 5


@pytest.mark.parametrize("from_store", [True, False])
def test_one_side_only_on_an_object_store(
    novels,
    expected,
    bucket,
    run_prepare,
    tmp_path,
    from_store,
):
    if from_store:
        run_prepare("textfiles", upload(novels, f"{bucket}/t"), tmp_path / "out", **OPTIONS)
        assert tree(tmp_path / "out") == expected
    else:
        run_prepare("textfiles", novels, f"{bucket}/out", **OPTIONS)
        assert stored(f"{bucket}/out") == expected


class Faults:
    """Makes the n-th change of an object store fail, before or after it is made."""

    def __init__(self, monkeypatch):
        self._patch = monkeypatch
        self.calls = []

    def at(self, number, *, after=False):
        """Fail at change `number`, counted from here; never where it is None."""
        self._patch.undo()
        error = ConnectionResetError(errno.ECONNRESET, "reset")
        # Units are run in this process, where writes can be seen.
        self._patch.setattr(
            local, "run", lambda task, units, _, on: local.run_here(task, units, on)
        )
        self.calls.clear()
        for name in ("put", "write", "create", "remove"):
            self._patch.setattr(Storage, name, self._failing(name, number, after, error))

    def _failing(self, name, number, after, error):
        working = getattr(Storage, name)

        def call(storage, *arguments):
            if storage.is_local:
                return working(storage, *arguments)
            self.calls.append((name, *(a for a in arguments if isinstance(a, str))))
            fails = len(self.calls) - 1 == number
            if fails and not after:
                raise error
            result = working(storage, *arguments)
            if fails:
                raise error
            return result

        return call


@pytest.fixture
def faults(small_units):
    with pytest.MonkeyPatch.context() as patch:
        yield Faults(patch)


@pytest.mark.slow
@pytest.mark.parametrize("every", [11, 3])
def test_lost_connections_at_any_change(every, novels, expected, bucket, run_prepare, faults):
    out = f"{bucket}/out"
    faults.at(None)
    run_prepare("textfiles", novels, out, **OPTIONS)
    writes = list(faults.calls)
    kinds = {(name, target.split("/")[1]) for name, target in writes if target.startswith(NAME)}
    assert {("create", "units"), ("put", "parts"), ("create", "job.json")} <= kinds
    assert writes[-1][0] == "remove"
    assert any(name == "put" and target.startswith("train/chunk") for name, target in writes)
    for number in range(len(writes) - 1, -1, -every):
        Storage(out).remove("")
        faults.at(number, after=number % 2 == 1)
        with pytest.raises((OSError, RunError)):
            run_prepare("textfiles", novels, out, **OPTIONS)
        faults.at(None)
        run_prepare("textfiles", novels, out, **OPTIONS)
        assert stored(out) == expected, writes[number]
        assert objects(out) == set()


def begun(run_prepare, novels, out, faults):
    """A task whose driver was ended when its plan was stored; its units in number."""
    faults.at(None)
    run_prepare("textfiles", novels, out, **OPTIONS)
    first = next(n for n, call in enumerate(faults.calls) if call[0] == "put")
    total = sum(call[0] == "create" and "/units/" in call[1] for call in faults.calls)
    Storage(out).remove("")
    faults.at(first)
    with pytest.raises(RunError):
        run_prepare("textfiles", novels, out, **OPTIONS)
    faults.at(None)
    return Task(out, str(novels)), total


def test_of_two_commits_of_a_unit_one_counts(
    novels,
    expected,
    bucket,
    run_prepare,
    faults,
    monkeypatch,
):
    out = f"{bucket}/out"
    task, total = begun(run_prepare, novels, out, faults)
    space = ObjectWorkspace(Storage(out))
    assert space.committed() == set()
    winner, loser = Work(task), Work(task)
    create = Storage.create
    lost = []

    def overtaken(storage, name, data):
        """Another machine commits the unit between our parts and our record."""
        monkeypatch.setattr(Storage, "create", create)
        winner.run(0, lambda _: None)
        lost.append(create(storage, name, data))
        return lost[-1]

    monkeypatch.setattr(Storage, "create", overtaken)
    seen: list[Progress] = []
    loser.run(0, seen.append)
    assert lost == [False]
    assert seen[-1].committed  # as good as its own
    assert space.committed() == {0}
    run_prepare("textfiles", novels, out, **OPTIONS)
    assert stored(out) == expected
    assert total > 4


def test_scraps_are_removed_when_a_put_fails(
    novels,
    bucket,
    run_prepare,
    faults,
    tmp_path,
    monkeypatch,
):
    task, _ = begun(run_prepare, novels, f"{bucket}/out", faults)
    scraps = tmp_path / "scraps"
    scraps.mkdir()
    worker = Work(task)
    monkeypatch.setattr(object_workspace.tempfile, "tempdir", str(scraps))
    faults.at(0)
    with pytest.raises(RunError, match="s3://.*run the same command again"):
        worker.run(0, lambda _: None)
    assert list(scraps.iterdir()) == []
    assert not [name for name in objects(f"{bucket}/out") if "/units/" in name]


def test_an_object_that_another_put_there_is_not_taken(bucket):
    store = Storage(bucket)
    assert store.create("a/b.json", b"first")
    assert not store.create("a/b.json", b"second")
    assert store.read("a/b.json") == b"first"
    store.write("a/b.json", b"third")
    assert store.read("a/b.json") == b"third"


def test_foreign_objects_are_not_removed(novels, bucket, run_prepare):
    Storage(bucket).write("out/thesis.pdf", b"years of work")
    with pytest.raises(UserError, match=r"thesis\.pdf"):
        run_prepare("textfiles", novels, f"{bucket}/out", **OPTIONS)
    assert Storage(bucket).read("out/thesis.pdf") == b"years of work"


def test_status_of_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match="no-such-bucket/out cannot be read.* check the URL"):
        status.show("s3://no-such-bucket/out")


def test_a_changed_object_is_noticed(novels, bucket, run_prepare, faults):
    source = upload(novels, f"{bucket}/text")
    faults.at(8)
    with pytest.raises(RunError):
        run_prepare("textfiles", source, f"{bucket}/out", **OPTIONS)
    faults.at(None)
    name = "a/3.txt"
    text = Storage(source).read(name)
    Storage(source).write(name, text.swapcase())  # of the same size
    with pytest.raises(UserError, match="unfinished work of another job"):
        run_prepare("textfiles", source, f"{bucket}/out", **OPTIONS)
    run_prepare("textfiles", source, f"{bucket}/out", overwrite=True, **OPTIONS)
    (novels / name).write_bytes(text.swapcase())
    anew = run_prepare("textfiles", novels, novels.parent / "anew", **OPTIONS)
    assert stored(f"{bucket}/out") == tree(anew)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_is_done(
    code, novels, expected, tmp_path, run_prepare, faults, monkeypatch
):
    out = tmp_path / "out"
    faults.at(None)
    working, runs = work.run_unit, []

    def full(plan, unit, root, engine, folder, *rest):
        runs.append(unit)
        if len(runs) == 4:
            (folder / "train-0.bin").write_bytes(b"half")
            raise OSError(code, os.strerror(code), str(folder))
        return working(plan, unit, root, engine, folder, *rest)

    monkeypatch.setattr(work, "run_unit", full)
    with pytest.raises(RunError, match=r"no space left for .*\(.* free\)"):
        run_prepare("textfiles", novels, out, **OPTIONS)
    space = LocalWorkspace(Storage(out))
    assert space.committed() == set(runs[:3])
    assert not list(out.rglob("train-0.bin.*"))
    assert not (space.folder / "tmp").exists()
    runs.clear()
    monkeypatch.setattr(work, "run_unit", lambda *a: (runs.append(a[1]), working(*a))[1])
    run_prepare("textfiles", novels, out, **OPTIONS)
    assert not {0, 1, 2} & set(runs)
    assert tree(out) == expected


def test_an_orphan_cannot_commit_a_unit_half_removed(tmp_path, monkeypatch):
    """The worker of a killed driver writes on while the next driver clears the scraps."""
    space = LocalWorkspace(Storage(tmp_path / "out"))
    unlink = os.unlink

    def orphan_writes(*arguments, **options):
        unlink(*arguments, **options)
        with contextlib.suppress(FileNotFoundError):
            (folder / "unit.json").write_text("{}")

    orphan = space.writing(3, None)
    folder = orphan.__enter__()
    (folder / "train-0.bin").write_text("tokens")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", orphan_writes)
        with space.locked():
            (space.folder / "job.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        orphan.__exit__(None, None, None)
    assert space.committed() == set()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full(novels, tmp_path, run_prepare, expected):
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", out])
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(RunError, match="space|need"):
            run_prepare("textfiles", novels, out / "data", **OPTIONS)
        assert not list((out / "data").rglob("manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=8m", out], check=True)
        run_prepare("textfiles", novels, out / "data", **OPTIONS)
        assert tree(out / "data") == expected
    finally:
        subprocess.run(["umount", out], check=True)

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from gristmill.data import storage
from gristmill.data.preparation.workspace import NAME, LocalWorkspace, Workspace, check_replaceable
from gristmill.data.storage import Storage
from gristmill.util.errors import UserError


@pytest.fixture
def space(tmp_path):
    return Workspace.open(Storage(tmp_path / "out"))


def test_a_unit_is_there_whole_or_not_at_all(space):
    def killed():
        with space.locked(), space.writing(3, None) as folder:
            (folder / "part").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        killed()
    assert space.committed() == set()
    assert not (space.folder / "tmp").exists()
    for text in ("first", "second"):  # a second execution is thrown away
        with space.writing(3, None) as folder:
            (folder / "part").write_text(text)
    assert space.committed() == {3}
    assert space.part(3, "part").read_text() == "first"


def test_placing_can_be_repeated(space):
    with space.writing(0, None) as folder:
        (folder / "train-0.bin").write_text("x")
    for _ in range(2):
        space.place(0, "train-0.bin", "train/chunk-0000000-0.bin")
    assert (space.out.path / "train" / "chunk-0000000-0.bin").read_text() == "x"


def test_without_locks_two_that_finish_do_not_share_scraps(space):
    other = Workspace.open(space.out)
    ours, theirs = (s.scratch() / "chunk.bin" for s in (space, other))
    ours.write_text("whole")
    theirs.write_text("ha")
    space.out.put(ours, "chunk.bin")
    assert (space.out.path / "chunk.bin").read_text() == "whole"


def test_a_lock_leaves_nothing_where_no_job_began(space):
    with space.locked():
        assert (space.out.path / NAME).is_dir()
    assert list(space.out.path.iterdir()) == []


LOCK = """
import sys
from gristmill.data import storage
from gristmill.data.storage import Storage
from gristmill.data.preparation.workspace import Workspace
with Workspace.open(Storage(sys.argv[1])).locked(shared=len(sys.argv) > 2):
    print("locked", flush=True)
    sys.stdin.read()
"""


def other_process(out, *more):
    return subprocess.Popen(
        [sys.executable, "-c", LOCK, str(out), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_second_waits_for_the_first(space):
    with space.locked():
        (space.folder / "job.json").write_text("{}")  # a job has begun
        waiting = other_process(space.out.path)
        assert "waiting" in waiting.stderr.readline()
        assert waiting.poll() is None
        space.close()  # it is finished: the lock file goes, too
    assert waiting.stdout.readline() == "locked\n"
    waiting.communicate("")
    assert waiting.returncode == 0
    assert list(space.out.path.iterdir()) == []


def test_ranks_share_the_lock(space):
    with space.locked(shared=True):
        other = other_process(space.out.path, "shared")
        assert other.stdout.readline() == "locked\n"
        other.communicate("")


def test_wiping_spares_other_peoples_files(space):
    space.folder.mkdir(parents=True)
    (space.folder / "job.json").write_text("{}")
    (space.out.path / "chunk-0000000-0.bin").write_text("x")
    (space.out.path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex"):
        space.wipe()
    assert (space.folder / "job.json").exists()
    (space.out.path / "thesis.tex").unlink()
    space.wipe()
    assert [path.name for path in space.out.path.iterdir()] == [NAME]
    assert space.stored() is None


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="holds other things than a dataset"):
        check_replaceable(Storage(tmp_path / "out"))
    assert isinstance(Workspace.open(Storage(tmp_path / "out")), LocalWorkspace)


def test_a_disk_without_links_will_do(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    place = Storage(tmp_path)
    assert place.create("job.json", b"first")
    assert not place.create("job.json", b"second")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("job.json", b"first")
    ]


class Silent:
    """A store that cannot be reached."""

    def invalidate_cache(self):
        pass

    def __getattr__(self, name):
        def call(*args, **options):
            raise ZeroDivisionError("no answer")

        return str if name == "_strip_protocol" else call


def test_a_store_that_does_not_answer_is_no_empty_one():
    """Or a finished dataset would be taken for none, and wiped."""
    place = Storage("s3://bucket/out")
    vars(place)["_fs"] = storage._Calls(Silent())
    for call in (place.exists, place.read, place.stat):
        with pytest.raises(OSError, match="ZeroDivisionError: no answer"):
            call("manifest.json")
    with pytest.raises(OSError, match="no answer"):
        Workspace.open(place).stored()

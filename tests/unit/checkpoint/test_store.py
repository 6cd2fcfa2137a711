from __future__ import annotations

import errno
import json
import os

import pytest

from gristmill.checkpoint import save as save_module
from gristmill.checkpoint import store, writer
from gristmill.checkpoint.load import load
from gristmill.checkpoint.save import Checkpointer
from gristmill.util.errors import RunError, UserError

from .conftest import build, same_state, train


def steps_on_disk(out_dir):
    return sorted(p.name for p in out_dir.iterdir())


def save_steps(checkpointer, pair, steps):
    for step in steps:
        checkpointer.save(step, *pair, {"samples": step})
    checkpointer.wait()


def test_retention(tmp_path, config, trained):
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_every=4, config=config)
    save_steps(checkpointer, trained, range(1, 8))
    assert not checkpointer.failed
    assert [store.step_of(p) for p in store.complete(tmp_path)] == [7, 6, 4]


def test_retention_counts_only_steps_up_to_the_one_saved(tmp_path, config, trained):
    checkpointer = Checkpointer(tmp_path, keep_last=2, config=config)
    save_steps(checkpointer, trained, [10, 20])
    save_steps(checkpointer, trained, [5])  # the run went back
    assert [store.step_of(p) for p in store.complete(tmp_path)] == [20, 10, 5]
    store.discard_after(tmp_path, 5)
    assert [store.step_of(p) for p in store.complete(tmp_path)] == [5]


def test_keep_last_below_two_is_refused(tmp_path, config):
    with pytest.raises(UserError, match="keep_last is 1"):
        Checkpointer(tmp_path, keep_last=1, config=config)
    with pytest.raises(UserError, match="keep_every is 0"):
        Checkpointer(tmp_path, keep_every=0, config=config)


def test_old_ones_stay_until_the_new_one_is_verified(tmp_path, config, trained, monkeypatch):
    """A write that the disk does not give back as it was must not cost an older checkpoint."""
    checkpointer = Checkpointer(tmp_path, keep_last=2, config=config)
    save_steps(checkpointer, trained, [1, 2])
    write_file = writer._write_file

    def corrupting(file, items, planner):
        digest = write_file(file, items, planner)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return digest

    monkeypatch.setattr(writer, "_write_file", corrupting)
    save_steps(checkpointer, trained, [3])
    assert checkpointer.failed
    assert steps_on_disk(tmp_path) == ["step-00000001", "step-00000002"]


def test_full_disk_keeps_training_and_the_next_save_works(
    tmp_path, config, trained, monkeypatch, capsys
):
    checkpointer = Checkpointer(tmp_path, config=config)
    save_steps(checkpointer, trained, [1])
    real_fsync = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    save_steps(checkpointer, trained, [2])
    monkeypatch.setattr(os, "fsync", real_fsync)
    assert checkpointer.failed
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "step-00000002 was not saved: No space left on device." in lines[0]
    assert steps_on_disk(tmp_path) == ["step-00000001"]

    save_steps(checkpointer, trained, [3])
    assert steps_on_disk(tmp_path) == ["step-00000001", "step-00000003"]
    assert checkpointer.failed  # the run's exit code tells of it


def test_too_little_space_is_found_before_writing(tmp_path, config, trained, monkeypatch, capsys):
    usage = save_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    checkpointer = Checkpointer(tmp_path, config=config)
    save_steps(checkpointer, trained, [1])
    assert checkpointer.failed
    assert "0.00 GB are free" in capsys.readouterr().err
    assert steps_on_disk(tmp_path) == []


def test_saving_a_step_again_replaces_it_as_a_whole(tmp_path, config, trained, monkeypatch):
    checkpointer = Checkpointer(tmp_path, config=config)
    save_steps(checkpointer, trained, [3])
    train(*trained, [3])
    # Killed while the replacement is written: the old one is still whole.
    monkeypatch.setattr(store, "write_record", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    save_steps(checkpointer, trained, [3])
    assert store.read_record(store.step_path(tmp_path, 3))["samples"] == 3
    store.verify(store.step_path(tmp_path, 3))
    monkeypatch.undo()

    save_steps(checkpointer, trained, [3])
    loaded = build(2)
    load(store.step_path(tmp_path, 3), *loaded)
    assert same_state(trained, loaded)
    assert steps_on_disk(tmp_path) == ["step-00000003"]


def test_clean_partial(tmp_path, config, trained):
    checkpointer = Checkpointer(tmp_path, config=config)
    save_steps(checkpointer, trained, [1, 2, 3])
    (tmp_path / "step-00000002" / store.RECORD_NAME).unlink()  # deletion killed half-way
    (tmp_path / "step-00000004" / "weights").mkdir(parents=True)  # save killed half-way
    (tmp_path / "step-00000005.new").mkdir()  # replacement killed half-way
    os.rename(tmp_path / "step-00000003", tmp_path / "step-00000003.new")  # killed in the swap
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "final").mkdir()
    assert store.complete(tmp_path) == [tmp_path / "step-00000001"]
    store.clean_partial(tmp_path)
    assert steps_on_disk(tmp_path) == ["final", "step-00000001", "step-00000003", "step-notes"]
    assert [store.step_of(p) for p in store.complete(tmp_path)] == [3, 1]


def test_killed_before_any_file_operation_leaves_no_false_checkpoint(
    tmp_path, config, trained, monkeypatch
):
    """Stop a save after each of its fsyncs in turn: what counts as complete is intact."""

    class Killed(BaseException):
        pass

    real_fsync = os.fsync
    for allowed in range(20):
        out_dir = tmp_path / str(allowed)
        checkpointer = Checkpointer(out_dir, config=config)
        count = 0

        def fsync(handle, allowed=allowed):
            nonlocal count
            if count == allowed:
                raise Killed
            count += 1
            real_fsync(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        checkpointer.save(1, *trained, {})
        checkpointer.wait()
        monkeypatch.undo()
        for path in store.complete(out_dir):
            store.verify(path)
        if count < allowed:
            assert store.complete(out_dir)
            break
        store.clean_partial(out_dir)
    assert allowed > 5  # the save was stopped at several places, then ran through


def test_record_of_a_later_format(tmp_path, config, trained):
    checkpointer = Checkpointer(tmp_path, config=config)
    save_steps(checkpointer, trained, [1])
    path = store.step_path(tmp_path, 1)
    store.write_record(path, {"format": 99}, {})
    with pytest.raises(RunError, match="format 99"):
        store.read_record(path)
    (path / store.RECORD_NAME).write_text(json.dumps(["not", "a", "record"]))
    with pytest.raises(RunError, match="damaged"):
        store.read_record(path)

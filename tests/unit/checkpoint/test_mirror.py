"""The copy of a run on another disk or an object store."""

from __future__ import annotations

import json

import pytest

from gristmill.checkpoint import mirror, store
from gristmill.checkpoint.load import load
from gristmill.checkpoint.mirror import Mirror
from gristmill.checkpoint.save import Checkpointer
from gristmill.config.model import ModelConfig
from gristmill.data.storage import Storage
from gristmill.util.errors import RunError

from .conftest import build, train

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=16,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=8,
    max_seq_length=8,
)


def copied(url) -> list[str]:
    return sorted(mirror._steps(Storage(str(url))))


def run(out_dir, url, steps, *, keep_last=2, keep_every=None):
    """Train and save each step of `steps`; what copies has ended."""
    model, optimizer = build(1)
    copies = Mirror(str(url), out_dir, keep_last=keep_last, keep_every=keep_every)
    saver = Checkpointer(
        out_dir, keep_last=keep_last, keep_every=keep_every, config=CONFIG, mirror=copies
    )
    for step in steps:
        train(model, optimizer, [step])
        saver.save(step, model, optimizer, {"samples": step})
        saver.wait()
    saver.close()
    return model


def test_what_is_copied_is_gone_on_from(tmp_path):
    out_dir, url, other = tmp_path / "run", tmp_path / "copy", tmp_path / "other"
    trained = run(out_dir, url, [1, 2, 3])
    assert copied(url) == ["step-00000002", "step-00000003"]
    other.mkdir()
    path = mirror.fetch(str(url), other)
    store.verify(path)
    model, optimizer = build(2)
    assert load(path, model, optimizer)["samples"] == 3
    for name, value in model.state_dict().items():
        assert value.equal(trained.state_dict()[name]), name


def test_retention_is_that_of_the_run(tmp_path):
    run(tmp_path / "run", tmp_path / "copy", [1, 2, 3, 4, 5], keep_every=2)
    assert copied(tmp_path / "copy") == [f"step-0000000{n}" for n in (2, 4, 5)]


def test_a_run_that_went_back_takes_its_copy_with_it(tmp_path):
    out_dir, url = tmp_path / "run", tmp_path / "copy"
    run(out_dir, url, [1, 2, 3])
    store.discard_after(out_dir, 2)
    Mirror(str(url), out_dir, keep_last=2).copy()
    assert copied(url) == ["step-00000002"]


def test_another_checkpoint_of_the_same_step_replaces_its_copy(tmp_path):
    out_dir, url = tmp_path / "run", tmp_path / "copy"
    run(out_dir, url, [1, 2])
    store.discard_after(out_dir, 1)
    run(out_dir, url, [1, 2])
    ours = (out_dir / "step-00000002" / store.RECORD_NAME).read_bytes()
    assert (url / "step-00000002" / store.RECORD_NAME).read_bytes() == ours
    store.verify(url / "step-00000002")


def test_a_copy_cut_short_is_none_and_is_finished_later(tmp_path, monkeypatch, capsys):
    out_dir, url = tmp_path / "run", tmp_path / "copy"
    copy_in = Storage.copy_in

    def full(self, source, name):
        if name.startswith("step-00000002/optimizer"):
            raise OSError(28, "No space left on device")
        copy_in(self, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "copy_in", full)
        with pytest.raises(RunError, match="is whole, but its copy is not"):
            run(out_dir, url, [1, 2])
    assert "was not copied" in capsys.readouterr().err
    assert len(store.complete(out_dir)) == 2
    assert "step-00000002" not in copied(url)
    Mirror(str(url), out_dir, keep_last=2).copy()
    assert copied(url) == ["step-00000001", "step-00000002"]


def test_a_damaged_copy_is_not_taken(tmp_path, capsys):
    run(tmp_path / "run", tmp_path / "copy", [1, 2])
    victim = next((tmp_path / "copy" / "step-00000002" / "weights").iterdir())
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    (tmp_path / "other").mkdir()
    path = mirror.fetch(str(tmp_path / "copy"), tmp_path / "other")
    assert path.name == "step-00000001"
    assert "step-00000002 is passed over" in capsys.readouterr().err
    assert store.complete(tmp_path / "other") == [path]


def test_one_retired_while_it_is_copied_leaves_nothing(tmp_path, monkeypatch):
    out_dir, url = tmp_path / "run", tmp_path / "copy"
    run(out_dir, url, [1, 2])
    run(out_dir, tmp_path / "elsewhere", [3, 4])
    copy_in = Storage.copy_in

    def retired(self, source, name):
        copy_in(self, source, name)
        if name.startswith("step-00000003/optimizer"):
            store.remove(out_dir / "step-00000003")

    monkeypatch.setattr(Storage, "copy_in", retired)
    Mirror(str(url), out_dir, keep_last=2).copy()
    assert copied(url) == ["step-00000002", "step-00000004"]
    assert not (url / "step-00000003").exists()


def test_clear_removes_the_run_alone(tmp_path):
    url = tmp_path / "copy"
    run(tmp_path / "run", url, [1, 2])
    (url / "notes.txt").write_text("mine")
    mirror.clear(str(url))
    assert len(copied(url)) == 2  # nothing says that this is a run's
    (url / "run.yaml").write_text(json.dumps({}))
    mirror.clear(str(url))
    assert [path.name for path in url.rglob("*") if path.is_file()] == ["notes.txt"]

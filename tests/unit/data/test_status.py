from __future__ import annotations

import json

import pytest

from gristmill.config.commands import Prepare
from gristmill.data import prepare
from gristmill.data.preparation import status
from gristmill.data.preparation.executors import local
from gristmill.data.storage import Storage
from gristmill.util.errors import Interrupted, UserError

from .conftest import tree


@pytest.fixture
def unfinished(run_prepare, novels, tmp_path, small_units, monkeypatch):
    """A job of which two units are done."""
    (novels / "a" / "00.txt").write_bytes(b"\0")
    run_here = local.run_here

    def only_two(task, units, workers, on_progress):
        run_here(task, units[:2], on_progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "run", only_two)
        with pytest.raises(Interrupted):
            run_prepare("textfiles", novels, tmp_path / "out")
    return tmp_path / "out"


def test_what_is_done_is_told_from_commits(unfinished):
    before = tree(unfinished)
    records = [
        json.loads((unfinished / ".prepare" / "units" / name / "unit.json").read_text())
        for name in ("u-0000000", "u-0000001")
    ]
    parts = [part for record in records for part in record["splits"][0]["parts"]]
    told = status.text(Storage(unfinished))
    assert ": 2 of " in told
    assert f"{sum(part['tokens'] for part in parts):,} tokens; 0 MB of text left" in told
    assert "left out, unreadable: 1 document (1 binary)" in told
    assert tree(unfinished) == before


def test_all_parts_done_but_not_completed(unfinished, run_prepare, novels, monkeypatch):
    def stopped(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finalize", stopped)
        with pytest.raises(MemoryError):
            run_prepare("textfiles", novels, unfinished)
    assert "the prepare command completes the dataset" in status.text(Storage(unfinished))


def test_a_finished_dataset_says_so(run_prepare, records, tmp_path, capsys):
    out = run_prepare("jsonl", records, tmp_path / "out", val_fraction=0.2)
    capsys.readouterr()
    prepare.prepare(Prepare(layout="status", output_dir=str(out)))
    told = capsys.readouterr().out
    assert told.startswith(f"finished: {out}: 300 documents")
    assert "Next" not in told


def test_nothing_was_ever_prepared_there(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no preparation"):
            status.show(str(place))

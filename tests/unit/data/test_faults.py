"""Damaged inputs, dying workers, full disks: what each costs, and what the user is told."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.data import prepare
from gristmill.data.preparation import parts, workspace
from gristmill.data.preparation.workspace import Workspace
from gristmill.data.storage import Storage
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import RunError, UserError


def test_too_little_space_is_refused_before_the_start(run_prepare, records, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 3000, 3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"no space left .* needed, 3\.00 kB are free.*free some"):
        run_prepare("jsonl", records, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_disk_that_fills_up_keeps_what_is_done(
    run_prepare, novels, tmp_path, monkeypatch, small_units, in_this_process
):
    write, written = parts.write_chunk, []

    def full(path, *args, **kwargs):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return write(path, *args, **kwargs)

    monkeypatch.setattr(parts, "write_chunk", full)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"no space left for .*B free\).*what is done is kept"):
        run_prepare("textfiles", novels, out)
    assert not (out / workspace.NAME / "tmp").exists()
    assert len(list((out / workspace.NAME / "units").iterdir())) == 2
    monkeypatch.setattr(parts, "write_chunk", write)
    run_prepare("textfiles", novels, out)
    assert Dataset.open(out).num_documents == 12


def test_an_output_that_cannot_be_written(run_prepare, records, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", Path("/proc/gristmill")):
        with pytest.raises(UserError, match=r"cannot write in .*name another --output_dir"):
            run_prepare("jsonl", records, place)


def change_after_planning(monkeypatch, path):
    make_plan = prepare.make_plan

    def then_changes(*args):
        plan = make_plan(*args)
        path.write_text(path.read_text().upper())
        return plan

    monkeypatch.setattr(prepare, "make_plan", then_changes)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_damaged_input_costs_its_unit_only(
    num_workers, run_prepare, novels, tmp_path, small_units, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        change_after_planning(patch, novels / "a" / "01.txt")
        with pytest.raises(RunError, match=r"(?s)1 of \d+ parts .*a/01\.txt.* has changed"):
            run_prepare("textfiles", novels, out, num_workers=num_workers)
    stored = Workspace.open(Storage(out)).stored()
    assert len(list((out / workspace.NAME / "units").iterdir())) == stored["units"] - 1
    assert not (out / "manifest.json").exists()


def test_damaged_inputs_are_quarantined_within_the_budget(
    run_prepare, records, tmp_path, small_units
):
    folder = records.parent
    packed = gzip.compress(records.read_bytes())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(RunError, match=r"(?s)3 of \d+ parts .*cut\.jsonl\.gz") as failed:
        run_prepare("jsonl", folder, tmp_path / "out")
    assert str(failed.value).count("cut.jsonl.gz") == 1
    with pytest.raises(UserError, match=r"3 damaged inputs .*--max_reject_fraction"):
        run_prepare("jsonl", folder, tmp_path / "out", on_error="quarantine")
    options = {"on_error": "quarantine", "max_reject_fraction": 0.9}
    out = run_prepare("jsonl", folder, tmp_path / "out", **options)
    assert 300 < Dataset.open(out).num_documents < 600  # the sound part of the file is taken
    left_out = Dataset.open(out).manifest.source.quarantined
    assert {path for path, _ in left_out} == {"cut.jsonl.gz"}
    assert "cut.jsonl.gz" in (out / "rejects.jsonl").read_text()


def test_the_first_bad_document_ends_the_job_if_asked(run_prepare, novels, tmp_path, small_units):
    (novels / "a" / "image.txt").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(UserError, match=r"image\.txt .*binary") as error:
        run_prepare("textfiles", novels, tmp_path / "out", on_error="fail", num_workers=2)
    assert error.value.fix == {"--on_error": "skip"}


def test_a_unit_that_kills_its_worker_is_left_out(
    run_prepare, novels, tmp_path, small_units, monkeypatch
):
    (tmp_path / "deadly_map.py").write_text(
        "import os\n"
        "def taste(texts):\n"
        "    if any('POISON' in text for text in texts) and 'DRIVER' not in os.environ:\n"
        "        os._exit(9)\n"
        "    return [True for _ in texts]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (novels / "a" / "05.txt").write_text("POISON " * 2000)
    out = tmp_path / "out"
    for _ in range(2):  # a single part that is left is not run in our own process either
        with pytest.raises(RunError, match=r"(?s)1 of .*a/05\.txt.*died 3 times .*code 9"):
            run_prepare("textfiles", novels, out, num_workers=2, map="deadly_map:taste")
    missing = Workspace.open(Storage(out)).stored()["units"] - 1
    assert len(list((out / workspace.NAME / "units").iterdir())) == missing
    monkeypatch.setenv("DRIVER", "1")
    run_prepare("textfiles", novels, out, num_workers=2, map="deadly_map:taste")
    assert Dataset.open(out).num_documents == 12


def test_no_worker_can_start(run_prepare, novels, tmp_path, small_units, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match=r"no worker process can start \(exit code 1"):
        run_prepare("textfiles", novels, tmp_path / "out", num_workers=1)


@pytest.mark.parametrize(
    ("closed", "buffers"), [("stdout", True), ("stdout", False), ("stderr", True)]
)
def test_a_reader_that_leaves_costs_nothing(closed, buffers, records, tokenizer_dir, tmp_path):
    """As in `gristmill prepare ... | head -1`: the work is done, whoever looks on."""
    table = pa.table({"text": [json.loads(line)["text"] for line in records.open()]})
    pq.write_table(table, records.parent / "a.parquet")
    (records.parent / "cut.parquet").write_bytes(b"PAR")  # something is said on the way
    script = "import sys; from gristmill.data.preparation import progress\n"
    script += "progress._PLAIN_INTERVAL_S = 0.0\n"
    script += "from gristmill.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "prepare", "parquet", "--num_workers", "1"]
    command += ["--input_dir", records.parent, "--output_dir", tmp_path / "out"]
    command += ["--tokenizer_dir", tokenizer_dir, "--engine", "tokenizers"]
    command += ["--on_error", "quarantine", "--max_reject_fraction", "0.1"]
    reading, writing = os.pipe()
    os.close(reading)
    other = "stderr" if closed == "stdout" else "stdout"
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffers else "1"},
        **{closed: writing, other: subprocess.PIPE},
        text=True,
        check=False,
    )
    os.close(writing)
    told = getattr(done, other)
    assert ("error" in told, done.returncode) == (False, 0), told
    assert ("1 of 2 inputs" if closed == "stdout" else "300 documents") in told
    assert Dataset.open(tmp_path / "out").num_documents == 300


def test_a_rank_whose_reader_leaves_is_no_error_of_the_disk(
    run_prepare, novels, tmp_path, monkeypatch, small_units
):
    def left(*args, **kwargs):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", left)
    with pytest.raises(BrokenPipeError):
        run_prepare("textfiles", novels, tmp_path / "out", executor="array", rank=1, world=2)

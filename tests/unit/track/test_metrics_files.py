from __future__ import annotations

import csv
import errno
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.config.sections import LogArgs
from gristmill.track import metrics
from gristmill.track.metrics import MetricsFile
from gristmill.track.tracker import open_trackers
from gristmill.util.errors import UserError


def rows_of(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def csv_rows(out_dir):
    with (out_dir / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def log_steps(trackers, steps):
    for step in steps:
        trackers.log({"loss": 1.0 / step, "tokens": 10 * step}, step)


def test_rows_are_on_disk_at_once(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.log({"loss": 0.1 + 0.2, "tokens": 2**60, "mfu": math.nan, "grad_norm": math.inf}, 1)
    assert rows_of(tmp_path) == [
        {"step": 1, "loss": 0.1 + 0.2, "tokens": 2**60, "mfu": None, "grad_norm": None}
    ]
    file.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\x00\x00\n", b"[]\n"])
def test_resume_cuts_back_and_every_step_appears_once(tmp_path, torn):
    trackers = open_trackers(["csv"], tmp_path, LogArgs(), start_step=0)
    log_steps(trackers, range(1, 9))
    trackers.close()
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("9,0.1")
    trackers = open_trackers(["csv"], tmp_path, LogArgs(), start_step=5)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    log_steps(trackers, range(6, 11))
    trackers.close()
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 11))
    assert [int(row["step"]) for row in csv_rows(tmp_path)] == list(range(1, 11))
    assert [float(row["loss"]) for row in csv_rows(tmp_path)] == [1 / s for s in range(1, 11)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_a_start_from_step_zero_begins_anew(tmp_path):
    """The initial validation has step 0 and is made again."""
    for _ in range(2):
        trackers = open_trackers(["csv"], tmp_path, LogArgs(), start_step=0)
        trackers.log({"val_loss": 4.0}, 0)
        trackers.log({"loss": 3.0}, 1)
        trackers.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1]
    assert [row["step"] for row in csv_rows(tmp_path)] == ["0", "1"]


@given(cut=st.integers(0, 400), start=st.integers(1, 12))
def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path_factory, cut, start):
    out_dir = tmp_path_factory.mktemp("run")
    content = b"".join(
        json.dumps({"step": s, "loss": 1 / s}).encode() + b"\n" for s in range(1, 13)
    )
    (out_dir / "metrics.jsonl").write_bytes(content[:cut])
    MetricsFile(out_dir, start).close()
    whole = content[:cut].count(b"\n")
    assert [row["step"] for row in rows_of(out_dir)] == list(range(1, min(whole, start) + 1))


def test_rows_a_full_disk_refused_come_with_the_next(tmp_path, capsys):
    trackers = open_trackers(["none"], tmp_path, LogArgs(), start_step=0)
    file = trackers._trackers[0]
    real = file._file

    class Full:
        """Takes a few bytes, then has no room."""

        def __init__(self):
            self.room = 7

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real.write(data[: self.room])
            self.room -= written
            return written

        def truncate(self, size):
            return real.truncate(size)

    file._file = Full()
    log_steps(trackers, [1, 2])
    file._file = real
    log_steps(trackers, [3])
    trackers.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "No space left" in said[0]


def test_csv_grows_a_column(tmp_path):
    trackers = open_trackers(["csv"], tmp_path, LogArgs(), start_step=0)
    trackers.log({"loss": 3.0}, 1)
    trackers.log({"loss": 2.0, "val_loss/code": 1.5}, 2)
    trackers.close()
    trackers = open_trackers(["csv"], tmp_path, LogArgs(), start_step=2)
    trackers.log({"loss": 1.0}, 3)
    trackers.close()
    assert [(r["loss"], r["val_loss/code"]) for r in csv_rows(tmp_path)] == [
        ("3.0", ""),
        ("2.0", "1.5"),
        ("1.0", ""),
    ]


def test_interrupted_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path, 0)
    file.log({"loss": 1.0}, 1)
    file.close()
    monkeypatch.setattr(metrics.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        MetricsFile(tmp_path, 5)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


def test_unknown_tracker(tmp_path):
    with pytest.raises(UserError, match="comet is not known.*csv, tensorboard, wandb"):
        open_trackers(["comet"], tmp_path, LogArgs(), start_step=0)

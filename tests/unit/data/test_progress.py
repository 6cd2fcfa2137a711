from __future__ import annotations

import io

import pytest

from gristmill.data.preparation import progress, summary
from gristmill.data.preparation.progress import Meter, duration
from gristmill.data.preparation.units import Progress
from gristmill.data.storage import Storage
from gristmill.data.store.dataset import Dataset


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_plain_lines_now_and_then(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Meter({3: 40_000_000, 4: 60_000_000}) as meter:
        clock.now += 5
        meter.update(3, Progress(10_000_000, 7, 2_000_000))
        assert capsys.readouterr().err == ""
        clock.now += 5
        # Its size was overestimated: what is committed counts as done.
        meter.update(3, Progress(30_000_000, 20, 6_000_000, committed=True))
        assert len(capsys.readouterr().err.splitlines()) == 1
        clock.now += 10
        meter.update(4, Progress(10_000_000, 5, 2_000_000, rejects=3))
        (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "preparing  50% | 1 of 2 parts | 25 documents | 40 MB | 8.0 M tokens | 0.40 M tokens/s | "
        "20 s left | 3 rejects"
    )


def test_the_time_left_follows_the_speed_of_late(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Meter({0: 1000}) as meter:
        for second in range(100):
            clock.now += 1
            meter.update(0, Progress(10 if second < 30 else 10 + (second - 30) * 5, 1, 1))
        lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("preparing  36%")  # 5 bytes a second for the last minute
    assert "2 min 9 s left" in lines[-1]


def test_a_unit_that_is_run_again_is_not_counted_twice(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Meter({0: 100, 1: 100}) as meter:
        meter.update(0, Progress(90, 9, 30))  # its worker dies
        clock.now += 10
        meter.update(0, Progress(50, 5, 20))
    assert "preparing  25% | 0 of 2 parts | 5 documents" in capsys.readouterr().err


def test_a_live_line_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Meter({0: 100}) as meter:
        clock.now += 1
        meter.update(0, Progress(50, 1, 25))
    assert "preparing  50%" in terminal.getvalue()


def test_the_summary_names_what_was_made(run_prepare, records, tmp_path):
    out = run_prepare("jsonl", records, tmp_path / "out", val_fraction=0.2)
    made = {name: Dataset.open(out / name).manifest for name in ("train", "val")}
    text = summary.text(Storage(out), made, 2.0)
    assert f"val:   {made['val'].totals.tokens:,} tokens in {out / 'val'}" in text
    assert text.endswith(f"--data.data_path {out}")
    assert "Next" not in summary.text(Storage(out), made, 2.0, following=False)
    assert "MB/s" in text
    assert "MB/s" not in summary.text(Storage(out), made, 2.0, is_whole=False)


def test_the_summary_names_what_chose(run_prepare, records, tmp_path):
    def said(name, **options):
        out = run_prepare("jsonl", records, tmp_path / name, **options)
        return summary.text(Storage(out), {"": Dataset.open(out).manifest}, None)

    assert "small slice" not in said("all")
    assert "a small slice, to try the command (--fast_dev_run)" in said("try", fast_dev_run=True)
    unknown = {"no_such_field": {"not_in": ["x"]}}
    assert 'by filters: nothing ({"no_such_field"' in said("filtered", filter=unknown)


def test_a_speed_is_told_of_whole_runs_only(run_prepare, records, tmp_path, capsys):
    run_prepare("jsonl", records, tmp_path / "out")
    assert "MB/s" in capsys.readouterr().out
    run_prepare("jsonl", records, tmp_path / "out")
    said = capsys.readouterr().out
    assert "finished already" in said
    assert "MB/s" not in said

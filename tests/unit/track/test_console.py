from __future__ import annotations

import io
import re
import sys

import pytest

from gristmill.track.console import Console, count, duration

ROW = {
    "loss": 3.45678,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens": 1_234_567,
    "samples": 600,
    "tokens_per_s": 6540.2,
    "step_time_s": 0.3,
    "data_wait_s": 0.001,
    "mfu": 0.312,
    "memory_bytes": 1.23e9,
    "epoch": 0.2,
}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def run_steps(console, clock, steps, seconds_per_step=1.0):
    for step in steps:
        clock.now += seconds_per_step
        console.log(ROW, step)


def test_plain_rows(clock):
    stream = io.StringIO()
    console = Console(1000, stream=stream, clock=clock)
    console.start({"model": "tiny", "precision": "32-true"})
    run_steps(console, clock, range(1, 11))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["model      tiny", "precision  32-true"]
    assert lines[2] == (
        "step 5/1,000  loss 3.4568  lr 1.00e-03  grad 0.50  6,540 tok/s  MFU 31%  1.23 GB  "
        "1.2M tokens  0:16:35 left"
    )
    assert len(lines) == 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_plain_rows_get_rarer(clock):
    stream = io.StringIO()
    console = Console(100_000, stream=stream, clock=clock)
    run_steps(console, clock, range(1, 50_001))
    assert 30 < len(stream.getvalue().splitlines()) < 400


def test_unknown_mfu_is_said_and_validation_always_shows(clock):
    stream = io.StringIO()
    console = Console(10, stream=stream, clock=clock)
    console.log({"val_loss": 4.0}, 0)
    row = {key: value for key, value in ROW.items() if key != "mfu"}
    clock.now = 0.1
    console.log({**row, "val_loss": 3.21, "val_bits_per_byte": 0.9841}, 1)
    clock.now = 20.0
    console.log(row, 2)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0  val loss 4.0000"
    assert lines[1] == "step 1  val loss 3.2100  0.984 bits/byte"
    assert "MFU n/a" in lines[2]


def test_close_shows_the_last_row_once(clock):
    stream = io.StringIO()
    console = Console(10, stream=stream, clock=clock)
    run_steps(console, clock, range(1, 4))
    console.close()
    console.close()
    assert stream.getvalue().count("step 3/10") == 1
    finished = io.StringIO()
    console = Console(3, stream=finished, clock=clock)
    run_steps(console, clock, range(1, 4))
    console.finished("out/final", {"val loss": 2.5})
    console.close()
    lines = finished.getvalue().splitlines()
    assert lines[0].startswith("step 3/3 ")
    assert lines[1:] == ["val loss  2.5", "model: out/final"]


def test_a_last_row_that_was_shown_when_it_came_is_not_repeated(clock):
    stream = io.StringIO()
    console = Console(3, stream=stream, clock=clock)
    run_steps(console, clock, range(1, 4))
    clock.now += 10
    console.log({"val_loss": 2.5}, 3)
    console.finished("out/final")
    lines = [line.split("  ")[0] for line in stream.getvalue().splitlines()]
    assert lines == ["step 3", "step 3/3", "model: out/final"]


def test_terminal_is_redrawn_at_most_four_times_a_second(clock, terminal):
    console = Console(10_000, stream=terminal, clock=clock)
    run_steps(console, clock, range(1, 1001), seconds_per_step=0.01)
    drawn = terminal.getvalue().count("step ")
    assert 35 <= drawn <= 41
    shown = terminal.getvalue()
    assert "tok/s" in shown
    assert "1.2M tokens" in shown
    assert "left" in shown
    console.close()
    assert terminal.getvalue().endswith("tokens\n")
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back


def test_a_resumed_run_counts_the_pace_from_its_start(clock):
    stream = io.StringIO()
    console = Console(1000, 900, stream=stream, clock=clock)
    run_steps(console, clock, range(901, 911))
    assert stream.getvalue().splitlines()[-1].endswith("0:01:30 left")


def test_what_the_first_step_compiles_is_not_taken_for_the_pace(clock):
    stream = io.StringIO()
    console = Console(100, stream=stream, clock=clock)
    console.log({"val_loss": 3.0}, 0)
    run_steps(console, clock, [1], seconds_per_step=60)
    assert "left" not in stream.getvalue()
    run_steps(console, clock, range(2, 11))
    assert "left" in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].endswith("left")
    assert "0:01:3" in stream.getvalue()


def test_prints_of_other_code_come_above_the_bar(clock, terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console(100, clock=clock)
    run_steps(console, clock, range(1, 3))
    print("a warning of somebody")
    console.note("a note")
    console.close()
    assert sys.stdout is terminal
    assert "a warning of somebody\n" in terminal.getvalue()
    assert "a note\n" in terminal.getvalue()


def test_a_note_from_a_signal_in_the_midst_of_a_write_comes_later(clock):
    class Busy(io.StringIO):
        busy = True

        def write(self, text):
            if self.busy:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter>")
            return super().write(text)

    stream = Busy()
    console = Console(10, stream=stream, clock=clock)
    console.note("saving after this step")
    stream.busy = False
    assert not stream.getvalue()
    console.log(ROW, 1)
    assert stream.getvalue() == "saving after this step\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_stream_that_goes_away_does_not_stop_the_run(clock, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    console = Console(10, stream=Gone(), clock=clock)
    console.start({"model": "tiny"})
    run_steps(console, clock, range(1, 10), seconds_per_step=100)
    console.note("x")
    console.finished("final")
    console.close()


def test_numbers():
    assert [count(n) for n in (0, 9_999, 12_345, 1_500_000, 3e9, 3e12)] == [
        "0",
        "9,999",
        "12.3k",
        "1.5M",
        "3.0B",
        "3.0T",
    ]
    assert [duration(s) for s in (0, 59.6, 3723, 90_000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:03",
        "1 d 01:00",
    ]

"""Workers of one machine: watched, judged, started again; small Python programs stand for them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import pytest

from gristmill.launch.local import run_workers
from gristmill.launch.world import join, outer_world
from gristmill.util.errors import Interrupted, RunError, UserError

HEAD = """
import json, os, signal, sys, time
from pathlib import Path
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def say(**content):
    Path(os.environ["GRISTMILL_REPORTS"], f"report-{rank}.json").write_text(json.dumps(content))
"""


def workers(body: str, count: int = 2, max_restarts: int = 0) -> None:
    def command(attempt: int) -> list[str]:
        return [sys.executable, "-S", "-c", f"attempt = {attempt}{HEAD}{body}"]

    run_workers(command, count, max_restarts=max_restarts)


def test_each_is_told_who_it_is(tmp_path):
    workers(f"Path({str(tmp_path)!r}, str(rank)).write_text(json.dumps(dict(os.environ)))", 3)
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [one["RANK"] for one in told] == [one["LOCAL_RANK"] for one in told] == ["0", "1", "2"]
    assert {one["WORLD_SIZE"] for one in told} == {"3"}
    assert len({one["GRISTMILL_RENDEZVOUS"] for one in told}) == 1
    assert {one["GRISTMILL_LAUNCHER"] for one in told} == {str(os.getpid())}


def test_a_mistake_is_the_users_and_wins_over_its_consequences():
    body = """
if rank == 1:
    say(kind="user", message="too large", fix={"--size": 2}); sys.exit(2)
time.sleep(60)
"""
    began = time.monotonic()
    with pytest.raises(UserError, match="^too large$") as error:
        workers(body, max_restarts=3)
    assert error.value.fix == {"--size": 2}
    assert time.monotonic() - began < 20


def test_a_killed_worker_ends_the_others_and_is_tried_again(capsys):
    body = (
        "if rank == attempt: os.kill(os.getpid(), signal.SIGKILL)\nif attempt < 2: time.sleep(60)"
    )
    workers(body, max_restarts=2)
    said = capsys.readouterr().err
    assert "worker 0 of 2 was killed by SIGKILL" in said
    assert "worker 1 of 2 was killed by SIGKILL" in said
    assert "starting again (2 of 2)" in said
    with pytest.raises(RunError, match="goes on from the newest checkpoint"):
        workers(body, max_restarts=1)


def test_what_a_silent_worker_wrote_is_shown():
    body = "if rank: print('what I saw last', flush=True); os._exit(3)\ntime.sleep(60)"
    with pytest.raises(RunError, match=r"worker 1 of 2 ended with code 3.*\n  what I saw last"):
        workers(body)


def test_a_failure_is_not_blamed_on_who_was_left_alone():
    body = """
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
say(kind="failed", message="connection lost"); os._exit(70)
"""
    with pytest.raises(RunError, match="worker 1 of 2 was killed"):
        workers(body)


def test_signals_are_passed_on():
    body = """
def leave(number, frame):
    say(kind="interrupted", message="saved", signal=number); os._exit(128 + number)
signal.signal(signal.SIGTERM, leave)
time.sleep(60)
"""
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted, match="saved") as stop:
        workers(body)
    assert stop.value.signal_number == signal.SIGTERM


def test_outer_worlds_are_told_apart():
    assert outer_world({}) is None
    assert outer_world({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None
    found = outer_world(
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    )
    assert (found.launcher, found.rank, found.size, found.attempt) == ("torchrun", 1, 2, 1)
    words = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    words |= {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[03-07,9],gpu1"}
    join(outer_world(words), words)
    assert (words["RANK"], words["WORLD_SIZE"], words["LOCAL_RANK"]) == ("3", "4", "1")
    assert (words["MASTER_ADDR"], words["MASTER_PORT"]) == ("node03", "20077")


def test_ranks_without_a_meeting_place_are_refused():
    words = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT"):
        join(outer_world(words), words)

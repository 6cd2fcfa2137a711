"""Several processes through the command line: they train as one does, and end as one does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import main, metrics, pretrain

from gristmill.checkpoint.store import complete, read_record
from gristmill.train import directory

HOOKS = '''
"""What can go wrong on one rank, and what the ranks read."""
import hashlib, json, os, signal, time
from pathlib import Path

def note(run, stats):
    """Which samples this rank read in a step, and the digest of each."""
    rows = run.rows
    line = {
        "step": run.state.step,
        "rows": {
            int(number): hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
            for number, tokens, valid in zip(rows.sample_ids, rows.tokens, rows.valid) if valid
        },
    }
    with open(f"{os.environ['NOTES']}.{run.mesh.rank}", "a") as file:
        file.write(json.dumps(line) + "\\n")

def at(run, rank, step):
    """Once in the life of a run directory."""
    if run.mesh.rank != rank or run.state.step != step:
        return False
    try:
        (run.job.out_dir / "happened").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def kill_one(run, stats):
    note(run, stats)
    if at(run, 1, 10):
        run.checkpointer.wait()
        os.kill(os.getpid(), signal.SIGKILL)

def kill_always(run, stats):
    if run.mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def interrupt(run, stats):
    if at(run, 0, 10):
        os.kill(int(os.environ["GRISTMILL_LAUNCHER"]), signal.SIGINT)
        time.sleep(0.5)

def sleep_on_one(run, stats):
    if run.mesh.rank == 1 and run.state.step == 6:
        time.sleep(60)

def stop_one(run, stats):
    if run.mesh.rank == 1 and run.state.step == 6:
        os.kill(os.getpid(), signal.SIGSTOP)

def slow(run, stats):
    time.sleep(0.2)

def nan_on_one(run, stats):
    if run.mesh.rank != 1:
        return
    import torch
    model = run.model
    if run.state.step == 5:
        run.poison = model.norm.register_forward_hook(lambda *a: a[2] * torch.nan)
    if run.state.step == 7:
        run.poison.remove()

def full_disk_on_one(run, stats):
    """The first save of rank 1 that comes finds no space."""
    if run.mesh.rank != 1 or run.state.step != 7:
        return
    from gristmill.checkpoint import writer
    real = writer._write_file
    def no_space(*args):
        writer._write_file = real
        raise OSError(28, "No space left on device")
    writer._write_file = no_space
'''


@pytest.fixture
def hooks(tmp_path, monkeypatch) -> Path:
    """The folder of a module `faults` that workers find, and of their notes."""
    (tmp_path / "faults.py").write_text(HOOKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(words) -> tuple[int, str]:
    """Exit code and output of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "gristmill", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def workers(folder: Path) -> list[int]:
    """Processes of a test that a launcher has started and that are alive."""
    found, marks = [], (b"GRISTMILL_LAUNCHER=", f"NOTES={folder}/".encode())
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if all(mark in variables for mark in marks):
            found.append(int(entry.name))
    return found


def close(out: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Both runs have every step once, with the same losses and final weights within rounding."""
    rows, others = metrics(out), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, expected in zip(rows, others, strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            assert row.get(name, 0) == pytest.approx(expected.get(name, 0), rel=tolerance)
    mine, theirs = (load_file(p / "final/model.safetensors") for p in (out, other))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def stream(notes: Path) -> dict[int, dict[str, str]]:
    """Samples and their digests by step, as the last attempt at each step read them."""
    ranks: dict[int, list[dict]] = {}
    for file in notes.parent.glob(f"{notes.name}*"):
        for line in file.read_text().splitlines():
            note = json.loads(line)
            ranks.setdefault(note["step"], []).append(note["rows"])
    return {
        step: {k: v for rows in parts for k, v in rows.items()} for step, parts in ranks.items()
    }


def test_two_processes_train_as_one(world, hooks):
    out = hooks / "run"
    code, said = run(pretrain(world, out, "--devices", "2"))
    assert code == 0, said
    assert "devices   2: shard 2" in said
    assert said.count("run       ") == 1
    close(out, world / "run")
    newest = complete(out)[0]
    assert read_record(newest)["world"] == 2
    assert len(list((newest / "weights").iterdir())) == 2
    # What has ended is ended for any number of devices.
    assert main(pretrain(world, out)) == 0
    assert not workers(hooks)


def test_a_killed_worker_is_started_again_with_the_others(world, hooks):
    words = ("--devices", "2", "--hook", "faults:kill_one")
    out = hooks / "run"
    code, said = run(pretrain(world, out, *words))
    assert code == 0, said
    assert "worker 1 of 2 was killed by SIGKILL" in said
    assert "starting again (1 of 3)" in said
    assert "going on after step 8" in said
    close(out, world / "run")


@pytest.mark.slow
def test_restarts_come_to_an_end(world, hooks):
    words = ("--devices", "2", "--hook", "faults:kill_always", "--max_restarts", "1")
    code, said = run(pretrain(world, hooks / "run", *words))
    assert code == 1
    assert said.count("starting again") == 1
    assert "goes on from the newest checkpoint" in said


@pytest.mark.slow
def test_ctrl_c_saves_and_is_told_once(world, hooks):
    out = hooks / "run"
    words = pretrain(world, out, "--devices", "2", "--hook", "faults:interrupt")
    code, said = run(words)
    assert code == 130, said
    assert complete(out)[0].name == "step-00000010"
    assert said.count("SIGINT: saving after this step") == 1
    assert said.count("stopped at step 10, saved") == 1
    assert main(words) == 0  # the hook signals once
    close(out, world / "run")


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_worker(world, hooks):
    out = hooks / "run"
    words = pretrain(world, out, "--devices", "2", "--hook", "faults:slow")
    launcher = subprocess.Popen([sys.executable, "-m", "gristmill", *words])
    wait_for(lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) > 3)
    mine = workers(hooks)
    assert len(mine) == 2
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not workers(hooks), seconds=5)
    rows = len(metrics(out))
    time.sleep(0.5)
    assert len(metrics(out)) == rows


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("hook", "blamed"),
    [("sleep_on_one", "rank 1 is still at the hook of step 6"), ("stop_one", "rank 1 (last at")],
)
@pytest.mark.slow
def test_a_stalled_rank_is_named(hook, blamed, world, hooks):
    words = ("--devices", "2", "--hook", f"faults:{hook}", "--stall_timeout", "5s")
    code, said = run(pretrain(world, hooks / "run", *words, "--max_restarts", "0"))
    assert code == 1
    assert blamed in said, said
    assert "has not moved for 5 s" in said
    assert not workers(hooks)


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(world, hooks):
    out = hooks / "run"
    code, said = run(pretrain(world, out, "--devices", "2", "--hook", "faults:nan_on_one"))
    assert code == 0, said
    rows = {row["step"]: row for row in metrics(out)}
    assert [step for step, row in rows.items() if step and row["loss"] is None] == [6, 7]
    assert said.count("the update was skipped") == 2
    assert read_record(complete(out)[0])["skipped_steps"] == 2


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_fails_on_all(world, hooks):
    out = hooks / "run"
    words = pretrain(world, out, "--devices", "2", "--hook", "faults:full_disk_on_one")
    code, said = run(words)
    assert code == 1
    assert said.count("step-00000008 was not saved: No space left on device") == 1
    assert [p.name[-2:] for p in complete(out)] == ["20", "16", "12"]
    assert main(words) == 0
    close(out, world / "run")


def test_a_mistake_is_said_once(world, hooks):
    out = hooks / "run"
    small = ("--train.global_batch_size", "1", "--train.micro_batch_size", "1")
    code, said = run(pretrain(world, out, "--devices", "2", *small))
    assert code == 2
    assert said.count("2 devices share batches of 1 samples") == 1
    assert "--train.global_batch_size 2" in said
    assert "--config" not in said
    code, said = run(pretrain(world, out, "--devices", "3", "--parallel.shard", "2"))
    assert code == 2
    assert said.count("error: ") == 1
    with directory.lock(out):
        code, said = run(pretrain(world, out, "--devices", "2"))
    assert code == 2
    assert said.count("is being written by another process") == said.count("error: ") == 1


@pytest.mark.slow
def test_torchrun_is_joined(world, hooks):
    out = hooks / "run"
    launch = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    launch += ["--master-port=29581", "--no-python", sys.executable, "-m", "gristmill"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, "-m", *launch, *pretrain(world, out, "--devices", "2")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    close(out, world / "run")


@pytest.mark.slow
def test_the_words_of_mpirun_are_joined(world, hooks):
    out = hooks / "run"
    started = []
    for rank in range(2):
        words = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
        own = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in words.items()}
        command = [sys.executable, "-m", "gristmill", *pretrain(world, out)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **own}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert b"devices   2: shard 2" in said[0]
    assert said[1] == b""
    close(out, world / "run")


@pytest.mark.slow
def test_two_processes_then_one_then_four_read_the_same_samples(world, hooks, monkeypatch):
    whole, out = hooks / "whole", hooks / "run"
    monkeypatch.setenv("NOTES", str(hooks / "undisturbed"))
    assert run(pretrain(world, whole, "--devices", "2", "--hook", "faults:note"))[0] == 0
    monkeypatch.setenv("NOTES", str(hooks / "notes"))
    killed = pretrain(world, out, "--devices", "2", "--hook", "faults:kill_one")
    code, said = run([*killed, "--max_restarts", "0"])
    assert code == 1, said
    assert complete(out)[0].name == "step-00000008"

    from test_kill import start

    hook = ("--hook", "faults:note")
    saving = start(pretrain(world, out, *hook), "gristmill.checkpoint.save:write_tensors", 3)
    saving.communicate(timeout=300)
    assert saving.returncode == -signal.SIGKILL
    assert complete(out)[0].name == "step-00000012"
    code, said = run(pretrain(world, out, "--devices", "4", *hook))
    assert code == 0, said
    assert "going on after step 12" in said
    read, expected = stream(hooks / "notes"), stream(hooks / "undisturbed")
    assert {step: sorted(rows.items()) for step, rows in read.items()} == {
        step: sorted(rows.items()) for step, rows in expected.items()
    }
    assert all(len(rows) == 4 for rows in expected.values())
    close(out, whole)


@pytest.mark.slow
def test_bits_are_the_same_on_as_many_processes(world, hooks):
    whole, out = hooks / "whole", hooks / "run"
    assert run(pretrain(world, whole, "--devices", "2"))[0] == 0
    code, said = run(pretrain(world, out, "--devices", "2", "--hook", "faults:kill_one"))
    assert code == 0, said
    assert "starting again" in said
    files = [hashlib.sha256((p / "final/model.safetensors").read_bytes()) for p in (out, whole)]
    assert files[0].digest() == files[1].digest()
    assert [row["loss"] for row in metrics(out)[1:]] == [row["loss"] for row in metrics(whole)[1:]]

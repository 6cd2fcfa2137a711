"""`--launcher slurm`: the script it writes is run for real by stand-ins of SLURM's programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_stub import install
from small import final_weights, main, metrics, pretrain, train_tokenizer, write_novels

from gristmill.config.commands import SlurmJob
from gristmill.launch.slurm import extra_options

SLURM = ("--launcher", "slurm", "--devices", "2")

HOOKS = '''
import os, signal, time
from pathlib import Path

def trouble(run, stats):
    """Rank 1 is killed at step 6, and at step 11 the time of the job is nearly over."""
    folder = run.job.out_dir
    if run.state.step == 6 and run.mesh.rank == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if run.state.step == 11 and run.mesh.rank == 0 and not (folder / "told").exists():
        (folder / "told").touch()
        (Path(os.environ["STUB"]) / "usr1").touch()
        time.sleep(1)
'''


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("slurm")
    train_tokenizer(write_novels(root / "novels"), root / "tokenizer")
    (root / "hooks.py").write_text(HOOKS)
    return root


def run(root: Path, words: list[str], **more: str) -> str:
    """A command beside the stand-ins; what it prints."""
    stub = root / "bin"
    env = {
        **os.environ,
        "PATH": f"{stub}:{os.environ['PATH']}",
        "STUB": str(stub),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-m", "gristmill", *words],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(stub: Path, out: Path, number: int, seconds: float = 120) -> tuple[int, int, str]:
    """Exit code of a job, how often it was queued again, and its log."""
    ended, deadline = stub / f"ended-{number}", time.monotonic() + seconds
    log = out / "slurm" / f"{number}.log"
    while not ended.exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    code, restarts = map(int, ended.read_text().split())
    return code, restarts, log.read_text()


@pytest.mark.slow
def test_a_job_restarts_what_died_and_is_queued_again_before_its_end(small_root):
    root, out = small_root, small_root / "job"
    shutil.rmtree(root / "bin", ignore_errors=True)
    stub = install(root / "bin")
    said = run(root, pretrain(root, out, *SLURM, "--hook", "hooks:trouble"))
    assert "submitted job 1: 1 x 2 cpu devices" in said
    code, restarts, log = wait_for(stub, out, 1)
    assert (code, restarts) == (0, 1), log
    assert "ended with code 137 (attempt 0 of 3)" in log
    assert "saved, queued again" in log
    assert [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, 21))
    run(root, pretrain(root, root / "calm", "--devices", "2"))
    assert final_weights(out) == final_weights(root / "calm")


@pytest.mark.slow
def test_text_is_prepared_in_the_job_by_all_machines(small_root):
    root, out = small_root, small_root / "prepares"
    shutil.rmtree(root / "bin", ignore_errors=True)
    stub = install(root / "bin")
    options = ("--launcher", "slurm", "--num_nodes", "2", "--slurm.prepare", "job")
    run(root, pretrain(root, out, *options))
    code, restarts, log = wait_for(stub, out, 1)
    assert (code, restarts) == (0, 0), log
    assert (out / "data/train/manifest.json").exists()
    assert metrics(out)[-1]["step"] == 20
    assert (out / "final/model.safetensors").exists()


def test_the_script_says_what_the_options_say(small_root, capsys, monkeypatch):
    monkeypatch.chdir(small_root)
    out = small_root / "a run"
    words = pretrain(small_root, out, "--launcher", "slurm", "--num_nodes", "3", "--devices", "8")
    words[words.index("--device") + 1] = "cuda"
    slurm = {
        "partition": "gpu",
        "account": "lab",
        "time": "24:00:00",
        "extra": "--mem=0 --qos='very long'",
        "cpus_per_task": "12",
        "submit": "false",
    }
    more = [word for name, value in slurm.items() for word in (f"--slurm.{name}", value)]
    assert main([*words, *more]) == 0
    script = out / "slurm/job.sh"
    assert f"sbatch '{script}'" in capsys.readouterr().out
    text = script.read_text()
    for option in (
        "--nodes=3",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--partition=gpu",
        "--account=lab",
        "--time=24:00:00",
        "--signal=USR1@300",
        "--requeue",
        "--mem=0",
        "'--qos=very long'",
        f"'--output={out}/slurm/%j.log'",
    ):
        assert f"#SBATCH {option}\n" in text
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=12" in text
    subprocess.run(["bash", "-n", script], check=True)
    settings = (out / "slurm/run.yaml").read_text()
    assert "device: cuda" in settings
    assert "launcher: auto" in settings


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--device", "auto"), "--device cuda"),
        (("--device", "cuda"), "--devices 8"),
        (("--devices", "0"), "--devices 0 is too few"),
        (("--slurm.extra", "gres=gpu:8"), "--name=value"),
        (("--slurm.extra", "--comment=a\n#SBATCH --wrap=b"), "no option"),
        (("--slurm.prepare", "job", "--data.val_data_path", "."), "--data.val_fraction"),
        (("--launcher", "auto", "--slurm.time", "1:00:00"), "add --launcher slurm"),
        ((), "there is no sbatch"),
    ],
)
def test_what_cannot_work_is_refused(small_root, tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = pretrain(small_root, tmp_path / "run", "--launcher", "slurm")
    assert main([*words, *more]) == 2
    assert says in capsys.readouterr().err


def test_a_job_that_sbatch_refuses_is_a_failure(small_root, tmp_path, capsys, monkeypatch):
    stub = tmp_path / "sbatch"
    stub.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(pretrain(small_root, tmp_path / "run", "--launcher", "slurm")) == 1
    assert "invalid partition" in capsys.readouterr().err


def test_more_options_are_a_list_or_a_text():
    wanted = ["--mem=0", "--comment=a b"]
    assert extra_options(SlurmJob(extra=wanted)) == wanted
    assert extra_options(SlurmJob(extra="--mem=0 --comment='a b'")) == wanted

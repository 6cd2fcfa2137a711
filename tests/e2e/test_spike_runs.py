"""Loss spikes in whole runs: left out, passed over, or the end; and going on is exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import final_weights, main, metrics, pretrain

from gristmill.checkpoint.store import complete, read_record
from gristmill.data.reading.corpus import Corpus, Part
from gristmill.train import fit

BATCH = 4
TRAIN_STEP, MOST_LOSS = fit.train_step, fit.Guard.most_loss
LOOK = ("--train.spike_window", "4", "--eval.initial_validation", "false")


class Injected:
    """Steps at the `bad` places in the data see weights that make their loss a spike."""

    def __init__(self, bad: set[int], stop_at: tuple[int, int] | None = None, how: str = ""):
        self.bad, self.stop_at, self.how = bad, stop_at, how
        self.places: list[int] = []

    def __call__(self, model, optimizer, batch, job, mesh, most_loss):
        run = self.run
        place = run.state.samples
        self.places.append(place)
        if (run.state.rewinds, run.state.step) == self.stop_at:
            if self.how == "crash":
                raise RuntimeError("injected")
            os.kill(os.getpid(), signal.SIGTERM)
        if place not in self.bad:
            return TRAIN_STEP(model, optimizer, batch, job, mesh, most_loss)
        weights = [(p, p.detach().clone()) for p in model.parameters()]
        with torch.no_grad():
            model.norm.weight.mul_(1e3)
        scaled = model.norm.weight.detach().clone()
        stats = TRAIN_STEP(model, optimizer, batch, job, mesh, most_loss)
        assert torch.equal(model.norm.weight, scaled) == stats.spike
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
        return stats


@pytest.fixture
def inject(monkeypatch):
    def begin(bad, **options) -> Injected:
        injected = Injected(bad, **options)

        def most_loss(guard, run):
            injected.run = run
            return MOST_LOSS(guard, run)

        monkeypatch.setattr(fit.Guard, "most_loss", most_loss)
        monkeypatch.setattr(fit, "train_step", injected)
        return injected

    return begin


def run(world: Path, out: Path, policy: str, *more: str) -> int:
    return main(pretrain(world, out, "--train.on_spike", policy, *LOOK, *more))


def test_a_spike_is_skipped_and_counted(world, tmp_path, inject, capsys):
    inject({10 * BATCH})
    assert run(world, tmp_path / "run", "skip") == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[10]["loss"] > 2 * rows[9]["loss"]
    assert rows[11]["loss"] < 1.5 * rows[9]["loss"]
    record = read_record(complete(tmp_path / "run")[0])
    assert record["skipped_steps"] == 1
    assert len(record["recent_losses"]) == 4
    assert "step 11: the loss" in capsys.readouterr().out


def test_nothing_is_done_about_spikes_unless_asked_for(world, tmp_path, inject):
    injected = inject({10 * BATCH})
    assert main(pretrain(world, tmp_path / "run")) == 0
    assert injected.places == [BATCH * step for step in range(20)]
    record = read_record(complete(tmp_path / "run")[0])
    assert (record["skipped_steps"], record["recent_losses"]) == (0, [])


def test_a_spike_stops_the_run_and_names_the_checkpoint(world, tmp_path, inject, capsys):
    inject({10 * BATCH})
    assert run(world, tmp_path / "run", "stop") == 1
    said = capsys.readouterr().err
    assert "step 11: the loss" in said
    assert str(tmp_path / "run/step-00000008") in said
    assert run(world, tmp_path / "run", "skip") == 0


def test_after_a_spike_the_run_goes_back_and_on_with_other_data(world, tmp_path, inject, capsys):
    injected = inject({10 * BATCH})
    assert run(world, tmp_path / "run", "rewind", "--logger_name", "csv") == 0
    # Steps 1 to 11, then from step 9 on with what comes after the eleventh batch.
    assert injected.places == [BATCH * n for n in range(11)] + [BATCH * n for n in range(11, 23)]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["samples"] for row in rows][7:10] == [32, 48, 52]
    assert rows[-1]["tokens"] == 20 * BATCH * 64
    lines = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, 21))
    record = read_record(complete(tmp_path / "run")[0])
    assert (record["rewinds"], record["samples"]) == (1, 23 * BATCH)
    assert "back to step 8, passing over the 12 samples since" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", [(1, 8), (1, 9), (2, 13), (0, 10)])
@pytest.mark.parametrize("how", ["crash", "signal"])
def test_going_on_after_a_rewind_is_exact(world, tmp_path, inject, stop_at, how):
    bad = {10 * BATCH, 15 * BATCH}
    whole = inject(bad)
    assert run(world, tmp_path / "whole", "rewind") == 0
    cut = inject(bad, stop_at=stop_at, how=how)
    code = run(world, tmp_path / "cut", "rewind")
    assert code == (143 if how == "signal" else 1)
    inject(bad)
    assert run(world, tmp_path / "cut", "rewind") == 0
    assert len(cut.places) < len(whole.places)
    for name in ("step", "samples", "loss"):
        assert [r[name] for r in metrics(tmp_path / "cut")] == [
            r[name] for r in metrics(tmp_path / "whole")
        ]
    assert final_weights(tmp_path / "cut") == final_weights(tmp_path / "whole")


def test_other_data_that_does_not_help_ends_the_run(world, tmp_path, inject, capsys):
    inject({BATCH * n for n in range(10, 100)})
    assert run(world, tmp_path / "run", "rewind") == 1
    said = capsys.readouterr().err
    assert "Other data does not help" in said
    assert str(tmp_path / "run/step-00000008") in said


def test_without_a_checkpoint_a_spike_is_skipped(world, tmp_path, inject, capsys):
    inject({6 * BATCH})
    assert run(world, tmp_path / "run", "rewind", "--train.save_interval", "20") == 0
    assert "there is no checkpoint to go back to" in capsys.readouterr().out
    assert read_record(complete(tmp_path / "run")[0])["skipped_steps"] == 1


HOOK = '''
import torch

def spoil(run, stats):
    """The weights that step 10 has left are spoiled on all ranks, once."""
    if run.state.step == 10 and run.state.rewinds == 0:
        with torch.no_grad():
            run.model.norm.weight.mul_(1e3)
'''


def test_several_ranks_go_back_together(world, tmp_path, monkeypatch):
    (tmp_path / "spoiling.py").write_text(HOOK)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hook = ("--hook", "spoiling:spoil", "--train.micro_batch_size", "2")
    assert run(world, tmp_path / "one", "rewind", *hook) == 0
    words = pretrain(world, tmp_path / "two", "--train.on_spike", "rewind", *LOOK, *hook)
    words = [sys.executable, "-m", "gristmill", *words, "--devices", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("back to step 8, passing over the 12 samples since") == 1
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [row["samples"] for row in two] == [row["samples"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    records = [read_record(complete(tmp_path / name)[0]) for name in ("one", "two")]
    assert [record["rewinds"] for record in records] == [1, 1]
    assert two[-1]["samples"] == 23 * BATCH


def test_what_a_rewind_passes_over_counts_as_read(world, tmp_path, inject, capsys):
    prepare = ["prepare", "textfiles", "--input_dir", str(world / "novels")]
    prepare += ["--output_dir", str(tmp_path / "data")]
    assert main([*prepare, "--tokenizer_dir", str(world / "tokenizer")]) == 0
    num_samples = Corpus.open([Part(tmp_path / "data")]).stream(64, seed=0).num_samples
    words = pretrain(world, tmp_path / "run", "--train.on_spike", "rewind", *LOOK)
    first = words.index("--data")
    source = {"path": str(tmp_path / "data"), "max_epochs": 84 / num_samples}
    mixture = ["--data", "Mixture", "--data.sources", json.dumps([source])]
    words[first : first + 6] = mixture
    inject({10 * BATCH})
    assert main(words) == 0
    # 20 steps would fit into 84 samples; 12 samples were passed over.
    assert metrics(tmp_path / "run")[-1]["step"] == 18
    assert read_record(complete(tmp_path / "run")[0])["samples"] == 84
    assert "read as often as it may be" in capsys.readouterr().out
    assert (tmp_path / "run/final/model.safetensors").is_file()
    assert main(words) == 0
    assert "A larger max_epochs of the source goes on" in capsys.readouterr().out
    source["max_epochs"] = 1.0
    mixture[-1] = json.dumps([source])
    words[first : first + 4] = mixture
    assert main(words) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 20

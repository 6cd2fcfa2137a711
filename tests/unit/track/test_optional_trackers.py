from __future__ import annotations

import sys
import types

import pytest

from gristmill.config.sections import LogArgs
from gristmill.track.tracker import open_trackers
from gristmill.util.errors import UserError


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in [(0, range(1, 7)), (4, range(5, 9))]:
        trackers = open_trackers(["tensorboard"], tmp_path, LogArgs(), start_step=start)
        for step in steps:
            trackers.log({"loss": 10.0 * step + start}, step)
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *((step, 10.0 * step) for step in range(1, 5)),
        *((step, 10.0 * step + 4) for step in range(5, 9)),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=rf"pip install 'gristmill\[{name}\]'"):
        open_trackers([name], tmp_path, LogArgs(), start_step=0)


class FakeRun:
    def __init__(self, **options):
        self.options, self.rows, self.finished = options, [], False

    def log(self, row, step):
        if row.get("loss") == "broken":
            raise ConnectionError("no route to host")
        self.rows.append((step, row))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    fake = types.ModuleType("wandb")
    fake.runs = []
    fake.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    fake.init = lambda **options: fake.runs.append(FakeRun(**options)) or fake.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_joins_the_same_run_after_a_restart(tmp_path, wandb):
    out_dir = tmp_path / "my-run"
    log = LogArgs(project="p", group="g")
    for start in (0, 4):
        trackers = open_trackers(["wandb", "csv"], out_dir, log, start_step=start)
        trackers.log({"loss": 1.0}, start + 1)
        trackers.close()
    first, second = wandb.runs
    assert first.options == second.options
    assert first.options["resume"] == "allow"
    assert (first.options["project"], first.options["group"]) == ("p", "g")
    assert first.options["name"] == "my-run"
    assert first.options["id"] == (out_dir / "wandb_id").read_text().strip()
    assert second.rows == [(5, {"loss": 1.0})]
    assert second.finished


def test_a_tracker_that_fails_is_said_once_and_does_not_stop_the_others(tmp_path, wandb, capsys):
    trackers = open_trackers(["wandb"], tmp_path, LogArgs(), start_step=0)
    for step in (1, 2):
        trackers.log({"loss": "broken"} if step == 1 else {"loss": 2.0}, step)
    trackers._trackers[0].close()
    assert wandb.runs[0].rows == [(2, {"loss": 2.0})]
    said = capsys.readouterr().err
    assert said.count("no route to host") == 1


def test_wandb_that_refuses_to_start(tmp_path, wandb):
    def refuse(**options):
        raise wandb.errors.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(UserError, match="api_key not configured.*wandb login"):
        open_trackers(["wandb"], tmp_path, LogArgs(), start_step=0)

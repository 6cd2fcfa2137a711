from __future__ import annotations

import json
import sys
import types

import pytest

from gristmill.config.sections import LogArgs
from gristmill.track.tracker import check_settings, open_trackers, tracker_names
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


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for package in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install .*\[{name}\]"):
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
    fake.Html = str
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


def test_a_tracker_that_fails_is_said_once_left_out_and_stops_nothing(tmp_path, wandb, capsys):
    trackers = open_trackers("wandb,csv", tmp_path, LogArgs(), start_step=0)
    for step in (1, 2):
        trackers.log({"loss": "broken"} if step == 1 else {"loss": 2.0}, step)
    trackers.close()
    assert wandb.runs[0].rows == []
    assert capsys.readouterr().err.count("no route to host") == 1
    assert "2,2.0" in (tmp_path / "metrics.csv").read_text()


def test_wandb_that_refuses_to_start(tmp_path, wandb, capsys):
    def refuse(**options):
        raise wandb.errors.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(UserError, match="api_key not configured.*wandb login"):
        open_trackers(["wandb"], tmp_path, LogArgs(), start_step=0)
    # A run that goes on by itself in the night does without.
    trackers = open_trackers(["wandb"], tmp_path, LogArgs(), start_step=4)
    trackers.log({"loss": 1.0}, 5)
    assert "api_key not configured" in capsys.readouterr().err


class FakeMlflow(types.ModuleType):
    """A store in memory that outlives its clients."""

    def __init__(self):
        super().__init__("mlflow")
        self.experiments, self.rows, self.texts, self.status = {}, [], [], {}
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, time, step: types.SimpleNamespace(
                key=key, value=value, step=step
            )
        )
        self.MlflowClient = lambda: self

    def get_experiment_by_name(self, name):
        number = self.experiments.get(name)
        return types.SimpleNamespace(experiment_id=number) if number else None

    def create_experiment(self, name):
        return self.experiments.setdefault(name, str(len(self.experiments) + 1))

    def create_run(self, experiment, run_name):
        self.status[f"{experiment}/{run_name}"] = "RUNNING"
        info = types.SimpleNamespace(run_id=f"{experiment}/{run_name}")
        return types.SimpleNamespace(info=info)

    def update_run(self, number, status):
        self.status[number] = status

    def get_metric_history(self, number, key):
        return [m for of, m in self.rows if of == number and m.key == key]

    def log_batch(self, number, metrics):
        self.rows += [(number, metric) for metric in metrics]

    def log_text(self, number, text, file):
        self.texts.append((number, text, file))

    def set_terminated(self, number):
        self.status[number] = "FINISHED"


def test_mlflow_joins_its_run_and_takes_no_step_twice(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for start, steps in ((0, range(1, 7)), (4, range(5, 9))):
        trackers = open_trackers("mlflow", tmp_path / "mill", LogArgs(run="r"), start)
        for step in steps:
            trackers.log({"tokens": step * 10, "val_loss/b@d": 1.5}, step)
            trackers.text("sample", "once", step)
        trackers.close()
    assert fake.status == {"1/r": "FINISHED"}
    assert list(fake.experiments) == ["gristmill"]
    assert [m.step for _, m in fake.rows if m.key == "tokens"] == list(range(1, 9))
    assert {m.key for _, m in fake.rows} == {"tokens", "val_loss/b_d"}
    assert fake.texts[-1] == ("1/r", "once", "sample/step-00000008.txt")
    assert len(fake.texts) == 8


def test_trackio_joins_its_run_by_name(tmp_path, monkeypatch):
    fake, calls = types.ModuleType("trackio"), []
    fake.init = lambda **options: calls.append(options)
    fake.log = lambda row, step: calls.append((step, row))
    fake.Table = lambda columns, data: data
    fake.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for start in (0, 4):
        trackers = open_trackers(["trackio"], tmp_path / "mill", LogArgs(group="g"), start)
        trackers.log({"loss": 1.0}, start + 1)
        trackers.text("sample", "once", start + 1)
        trackers.close()
    assert calls[0] == calls[4]
    assert calls[0]["resume"] == "allow"
    assert calls[0]["group"] == "g"
    assert calls[0]["name"].startswith("mill-")
    assert calls[5:] == [(5, {"loss": 1.0}), (5, {"sample": [["once"]]}), "finished"]


def test_names_of_trackers():
    assert tracker_names("none") == []
    assert tracker_names("csv, tensorboard,csv") == ["csv", "tensorboard"]
    assert tracker_names(["wandb", "mlflow"]) == ["wandb", "mlflow"]
    with pytest.raises(UserError, match="neptune is not known. Choose none, or .*trackio"):
        tracker_names("csv,neptune")
    with pytest.raises(UserError, match="no tracker and for one"):
        tracker_names("none,csv")


@pytest.mark.parametrize(
    ("names", "log", "refused"),
    [
        ("csv,tensorboard", LogArgs(project="p"), "project"),
        ("none", LogArgs(run="r"), "run"),
        ("mlflow", LogArgs(group="g"), "group"),
        ("mlflow,csv", LogArgs(project="p", run="r"), None),
        (["wandb"], LogArgs(project="p", run="r", group="g"), None),
    ],
)
def test_settings_that_no_tracker_takes_are_refused(names, log, refused):
    if refused is None:
        check_settings(names, log)
        return
    with pytest.raises(UserError, match=rf"--log\.{refused} is given, and no chosen tracker"):
        check_settings(names, log)


def test_texts_go_to_a_file_of_their_own_that_is_cut_back(tmp_path):
    for start, steps in ((0, (2, 4, 6)), (4, (6,))):
        trackers = open_trackers("csv", tmp_path, LogArgs(), start)
        for step in steps:
            trackers.log({"loss": 1.0}, step)
            trackers.text("sample", f"from {start}", step)
        trackers.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [
        (2, "from 0"),
        (4, "from 0"),
        (6, "from 4"),
    ]


def test_no_key_of_the_environment_is_printed(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "sesame-0123456789")

    def refuse(**options):
        raise wandb.errors.Error("https://me:open@host refuses sesame-0123456789")

    wandb.init = refuse
    with pytest.raises(UserError) as error:
        open_trackers("wandb", tmp_path, LogArgs(), start_step=0)
    open_trackers("wandb", tmp_path, LogArgs(), start_step=1)
    shown = str(error.value) + capsys.readouterr().err
    assert shown.count("https://***@host refuses ***") == 2
    assert "sesame" not in shown

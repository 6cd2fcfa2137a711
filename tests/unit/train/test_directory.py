"""A run directory belongs to one run; the same run is found again, another is refused."""

import dataclasses
import multiprocessing

import pytest

from gristmill.config.commands import Pretrain
from gristmill.config.data import TextFiles
from gristmill.config.sections import AdamW, TrainArgs
from gristmill.train import directory
from gristmill.train.length import Length
from gristmill.util.errors import UserError

LENGTH = Length(512, 8, 100, 2, 10, 10, None)


def settings(**changes):
    data = TextFiles(train_data_path="novels")
    return Pretrain(**{"model_name": "m", "data": data, **changes})


def identity(cfg, data="d1"):
    return directory.identity(cfg, {"num_layers": 2}, data, "32-true")


def start(path, cfg):
    path.mkdir(parents=True, exist_ok=True)
    directory.write(path, cfg, identity(cfg), LENGTH, 4)
    (path / "metrics.jsonl").write_text('{"step": 1}\n')


def find(cfg, name="m-novels", **kwargs):
    return directory.find(cfg, identity(cfg, **kwargs), name)


def test_a_new_run_gets_the_first_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, record = find(settings())
    assert (path.as_posix(), record) == ("out/m-novels-1", None)


def test_the_same_settings_find_their_run_and_others_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "out/m-novels-1", settings())
    path, record = find(settings())
    assert path.name == "m-novels-1"
    assert (record.length, record.micro_batch_size) == (LENGTH, 4)
    assert find(settings(seed=7))[0].name == "m-novels-2"
    assert find(settings(resume=False))[0].name == "m-novels-2"
    assert find(settings(), data="changed text")[0].name == "m-novels-2"


def test_what_may_change_still_finds_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "out/m-novels-1", settings())
    longer = settings(
        train=TrainArgs(max_tokens=10**9, micro_batch_size=2, save_interval=5, keep_last=5),
        logger_name="csv",
        compile="off",
    )
    assert find(longer)[0].name == "m-novels-1"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"optimizer": AdamW(lr=0.5)}, r"optimizer.init_args.lr: 0.001 -> 0.5"),
        ({"train": TrainArgs(global_batch_size=16)}, "train.global_batch_size: auto -> 16"),
        ({"train": TrainArgs(schedule="wsd")}, "train.schedule: cosine -> wsd"),
    ],
)
def test_another_run_in_the_directory_is_refused_by_what_differs(tmp_path, changes, named):
    out = tmp_path / "run"
    start(out, settings(out_dir=str(out)))
    with pytest.raises(UserError, match=f"holds another run: {named}") as error:
        find(settings(out_dir=str(out), **changes))
    assert error.value.fix == {"--out_dir": tmp_path / "run-2"}


def test_changed_text_is_another_run(tmp_path):
    out = tmp_path / "run"
    start(out, settings(out_dir=str(out)))
    with pytest.raises(UserError, match="data: d1 -> d2"):
        find(settings(out_dir=str(out)), data="d2")


def test_overwrite_and_resume_false(tmp_path):
    out = tmp_path / "run"
    start(out, settings(out_dir=str(out)))
    assert find(settings(out_dir=str(out), seed=7, overwrite=True)) == (out, None)
    with pytest.raises(UserError, match="already holds a run and --resume is false"):
        find(settings(out_dir=str(out), resume=False))


def test_a_model_directory_that_is_no_run_is_not_overwritten(tmp_path):
    (tmp_path / "run/final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no run.yaml"):
        find(settings(out_dir=str(tmp_path / "run")))


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        find(settings(out_dir=str(tmp_path / "run")))


def test_resume_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        directory.start_point(settings(resume=True), tmp_path, going_on=False)
    assert directory.start_point(settings(), tmp_path, going_on=False) is None


def test_resume_from_something_that_is_no_checkpoint(tmp_path):
    (tmp_path / "step-00000010").mkdir()
    for path in (tmp_path / "step-00000010", tmp_path / "missing", tmp_path):
        cfg = settings(resume=str(path), out_dir=str(tmp_path / "new"))
        with pytest.raises(UserError, match="Give a"):
            directory.start_point(cfg, tmp_path / "new", going_on=False)


def test_clear_deletes_the_run_and_nothing_else(tmp_path):
    start(tmp_path, settings())
    for name in ("step-00000001", "final", "mine", "logs", "step-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    directory.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "mine", "notes.txt", "step-notes"]


def test_clear_takes_nothing_where_no_run_was(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "metrics.jsonl").write_text("mine")
    directory.clear(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_never_stepped_does_not_claim_its_directory(tmp_path):
    directory.write(tmp_path, settings(), identity(settings()), LENGTH, 4)
    assert find(settings(out_dir=str(tmp_path), seed=7)) == (tmp_path, None)


def test_overwriting_the_run_that_is_resumed_from_is_refused(tmp_path):
    start(tmp_path, settings())
    cfg = settings(overwrite=True, resume=str(tmp_path / "step-00000001"))
    with pytest.raises(UserError, match="would delete the run"):
        find(cfg)


def _hold(path, ready, leave):
    with directory.lock(path):
        ready.set()
        leave.wait(30)


def test_one_writer_per_directory_and_a_dead_one_leaves_no_lock(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready, leave = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path, ready, leave))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"another process .pid {other.pid}"):
        directory.lock(tmp_path)
    other.kill()
    other.join()
    directory.lock(tmp_path).close()


def test_differences_are_named_with_dots():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    new = {"a": 1, "b": {"c": 5, "d": 3}, "e": 0}
    assert directory.differences(old, new) == ["b.c: 2 -> 5", "e: None -> 0"]


def test_an_unreadable_record_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text("length: [")
    with pytest.raises(UserError, match=r"run.yaml cannot be read"):
        directory.read(tmp_path)


def test_the_record_survives_its_file(tmp_path):
    cfg = settings(optimizer=AdamW(betas=(0.8, 0.9)))
    directory.write(tmp_path, cfg, identity(cfg), LENGTH, 2)
    record = directory.read(tmp_path)
    assert record == directory.Record(identity(cfg), LENGTH, 2)
    assert dataclasses.asdict(record.length) == dataclasses.asdict(LENGTH)

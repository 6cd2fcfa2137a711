import json

import pytest

from gristmill.infer import results
from gristmill.infer.results import ResultFile
from gristmill.util.errors import RunError, UserError

JOB = {"prompt": "a", "seed": 1}


def collect(path, places, *, stop=False, overwrite=False, job=JOB):
    """Put a record for each place; with `stop`, end as Ctrl-C does."""
    with ResultFile(str(path), job, overwrite=overwrite) as file:
        done = set(file.done)
        for place in places:
            file.add(place, {"place": list(place)})
        if stop:
            raise KeyboardInterrupt
    return done


def places_in(path):
    return [tuple(json.loads(line)["place"]) for line in path.read_text().splitlines()]


def test_records_are_in_order_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    collect(path, [(1, 0), (0, 1), (0, 0)])
    assert places_in(path) == [(0, 0), (0, 1), (1, 0)]
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_what_was_begun_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(path, [(2, 0), (0, 0)], stop=True)
    assert not path.exists()
    # Killed while a line was written.
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'[1, 0, {"pl')
    assert collect(path, [(1, 0)]) == {(2, 0), (0, 0)}
    assert places_in(path) == [(0, 0), (1, 0), (2, 0)]


def test_another_commands_texts_are_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(path, [(0, 0)], stop=True)
    with pytest.raises(UserError, match="holds texts of another command"):
        collect(path, [], job={**JOB, "seed": 2})
    assert collect(path, [(5, 0)], job={**JOB, "seed": 2}, overwrite=True) == set()
    assert places_in(path) == [(5, 0)]


def test_a_command_that_wrote_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "out.jsonl", [], stop=True)
    assert not list(tmp_path.iterdir())
    # Killed before its first text, it is in nobody's way.
    ResultFile(str(tmp_path / "out.jsonl"), JOB, overwrite=False)
    collect(tmp_path / "out.jsonl", [(0, 0)], job={**JOB, "seed": 2})
    assert places_in(tmp_path / "out.jsonl") == [(0, 0)]


def test_a_finished_file_is_kept_until_its_like_is_complete(tmp_path):
    path = tmp_path / "out.jsonl"
    collect(path, [(0, 0)])
    with pytest.raises(UserError, match=r"exists.*--overwrite true") as raised:
        collect(path, [(1, 0)])
    assert raised.value.fix == {"--overwrite": "true"}
    with pytest.raises(KeyboardInterrupt):
        collect(path, [(1, 0)], overwrite=True, stop=True)
    assert places_in(path) == [(0, 0)]
    assert collect(path, [(2, 0)], overwrite=True) == {(1, 0)}
    assert places_in(path) == [(1, 0), (2, 0)]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        collect(tmp_path, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*out.jsonl"):
        collect(tmp_path / "file" / "out.jsonl", [])


def test_a_full_disk_names_what_is_kept(tmp_path, monkeypatch):
    file = ResultFile(str(tmp_path / "out.jsonl"), JOB, overwrite=False)
    file.add((0, 0), {})
    monkeypatch.setattr(file, "_file", Full(file._file))
    with pytest.raises(RunError, match=r"No space.*1 texts are in it.*goes on"):
        file.add((1, 0), {})


def test_two_commands_at_once_are_kept_apart(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(str(path), JOB, overwrite=False) as file:
        file.add((0, 0), {"place": [0, 0]})
        for job, overwrite in ((JOB, False), ({**JOB, "seed": 2}, True)):
            with pytest.raises(UserError, match=r"another process is writing .*out\.jsonl now"):
                ResultFile(str(path), job, overwrite=overwrite)
    assert places_in(path) == [(0, 0)]


def test_what_another_command_finished_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    flock = results.fcntl.flock

    def late(file, how):
        """Another process ends between opening and locking."""
        monkeypatch.setattr(results.fcntl, "flock", flock)
        collect(path, [(3, 0)])
        flock(file, how)

    monkeypatch.setattr(results.fcntl, "flock", late)
    with pytest.raises(UserError, match="exists"):
        ResultFile(str(path), JOB, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    assert places_in(path) == [(3, 0)]


class Full:
    """A file on a disk without room."""

    def __init__(self, file):
        self.close = file.close

    def write(self, _):
        raise OSError(28, "No space left on device")

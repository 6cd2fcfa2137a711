"""Results of evaluations that end at once: each is kept, with its own samples."""

import fcntl
import json
import os
import threading
from types import SimpleNamespace

import pytest

from gristmill.config.evaluate import Evaluate
from gristmill.measure.results import Results

COUNT = 12


@pytest.fixture
def save(tmp_path):
    """Keeps the results of an evaluation of this number in one place for all."""
    subject = SimpleNamespace(describe=dict)
    source = SimpleNamespace(path=tmp_path / "model")

    def run(number):
        results = Results(Evaluate(save_filepath=str(tmp_path / "to/r.json")), source)
        results.save({"number": number, "samples": {"t": [{"number": number}]}}, subject)

    return run


def numbers(folder):
    return sorted(json.loads(file.read_text())["number"] for file in folder.glob("r*.json"))


def test_evaluations_at_once_lose_nothing(save, tmp_path):
    threads = [threading.Thread(target=save, args=(number,)) for number in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(tmp_path / "to") == list(range(COUNT))
    for file in (tmp_path / "to").glob("r*.json"):
        of_it = file.with_suffix(".samples") / "t.jsonl"
        assert json.loads(of_it.read_text())["number"] == json.loads(file.read_text())["number"]
    assert not list((tmp_path / "to").glob(".*"))


def test_one_that_was_faster_is_kept_where_nothing_locks(save, tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError

    link, file = os.link, tmp_path / "to/r.json"

    def late(source, target):
        if not (file.with_name("r-1.json")).exists():
            file.write_text(json.dumps({"number": 1}))
        link(source, target)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(os, "link", late)
    save(2)
    assert json.loads(file.read_text())["number"] == 2
    assert json.loads(file.with_name("r-1.json").read_text())["number"] == 1


def test_a_file_system_without_links_will_do(save, tmp_path, monkeypatch):
    def no_link(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_link)
    for number in range(3):
        save(number)
    assert numbers(tmp_path / "to") == [0, 1, 2]


def test_a_link_to_nowhere_is_moved_aside(save, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to/r.json").symlink_to(tmp_path / "gone.json")
    save(1)
    assert json.loads((tmp_path / "to/r.json").read_text())["number"] == 1
    assert not (tmp_path / "gone.json").exists()

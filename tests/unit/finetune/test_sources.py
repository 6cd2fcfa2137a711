"""Where records come from: files of all kinds, folders, and sets of a hub on this machine."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

import pyarrow as pa
import pytest
import zstandard
from data.fake_hub import Hub, Repository
from pyarrow import parquet

from gristmill.config.tuning_data import FLAN, JSON, Alpaca2k, Deita, LongForm, Records
from gristmill.finetune.records import conversation
from gristmill.finetune.sources import find_conversations, hold_out, read_records
from gristmill.util.errors import RunError, UserError

ROWS = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def contents():
    table = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    return {
        "a.json": json.dumps(ROWS).encode(),
        "b.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "c.json": LINES,
        "d.jsonl": LINES,
        "e.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n") + b"\r\n\r\n",
        "f.jsonl.gz": gzip.compress(LINES),
        "g.JSONL.zst": zstandard.compress(LINES),
        "h.parquet": table.getvalue().to_pybytes(),
    }


@pytest.mark.parametrize("name", sorted(contents()))
def test_files_of_every_kind(name, tmp_path):
    (tmp_path / name).write_bytes(contents()[name])
    assert read_records(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"[{", "not valid JSON"),
        ("a.json", b"{}", "not a list of records"),
        ("a.json", b"[]", "has no records"),
        ("a.jsonl", b'{"a": 1}\n{"a"', "line 2 of .* is not valid JSON"),
        ("a.jsonl", b"\n\n", "has no records"),
        ("a.parquet", b"PAR1 and more", "damaged or no parquet"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:100], "damaged or incomplete"),
        ("a.csv", b"x,y", "is no file of records"),
        ("a", b"x,y", "is no file of records"),
    ],
)
def test_files_that_are_none(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        find_conversations(JSON(json_path=str(tmp_path / name)))


def test_a_folder_with_train_and_val(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    (tmp_path / "validation.json").write_text(json.dumps(ROWS[:3]))
    found = find_conversations(JSON(json_path=str(tmp_path)))
    assert (len(found.train), len(found.val)) == (40, 3)
    one = find_conversations(
        JSON(json_path=str(tmp_path / "train.jsonl"), val_path=str(tmp_path / "validation.json"))
    )
    assert (one.name, len(one.val)) == ("train", 3)
    (tmp_path / "train.jsonl").rename(tmp_path / "mine.jsonl")
    with pytest.raises(UserError, match="has no file train.json"):
        find_conversations(JSON(json_path=str(tmp_path)))


def test_what_is_held_out_is_chosen_by_content(tmp_path):
    talks = [conversation(row) for row in ROWS]
    train, val = hold_out(talks, 0.1, 42)
    assert (len(train), len(val)) == (36, 4)
    again_train, again_val = hold_out(talks[::-1], 0.1, 42)
    assert again_val[::-1] == val
    assert again_train[::-1] == train
    assert hold_out(talks, 0.1, 43)[1] != val
    twice_train, twice_val = hold_out(talks * 2, 0.1, 42)
    assert not [talk for talk in twice_val if talk in twice_train]
    assert hold_out(talks[:1] * 5, 0.5, 42)[1] == []
    assert hold_out(talks[:1], 0.5, 42) == (talks[:1], [])


def test_bad_records_are_counted_over_all_files(tmp_path):
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps([*ROWS, {"text": "x"}]))
    with pytest.raises(UserError, match=r"train.json has records .*record 41"):
        find_conversations(JSON(json_path=str(tmp_path)))
    found = find_conversations(JSON(json_path=str(tmp_path), on_error="skip"))
    assert (len(found.train), len(found.val), found.skipped.count) == (40, 40, 2)


@dataclass(kw_only=True)
class Mine(Records):
    count: int = 10

    def records(self):
        return ROWS[: self.count], []


def test_a_class_of_the_users_own():
    found = find_conversations(Mine(count=20))
    assert (found.name, len(found.train), len(found.val)) == ("mine", 19, 1)
    with pytest.raises(UserError, match="has no records"):
        find_conversations(Records())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    ]
    table = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(chats), table)
    chat_rows = table.getvalue().to_pybytes()
    flan = b'{"inputs": "q", "targets": "a", "task": "t"}\n'
    written = b'[{"input": "q", "output": "a"}]'
    with Hub(
        datasets={
            "mhenrichsen/alpaca_2k_test": Repository(
                {"alpaca_2000.parquet": contents()["h.parquet"], "README.md": b"x"}
            ),
            "HuggingFaceH4/deita-10k-v0-sft": Repository(
                {
                    "data/train_sft-00000-of-00001.parquet": chat_rows,
                    "data/test_sft-00000-of-00001.parquet": chat_rows,
                    "data/train_gen-00000-of-00001.parquet": b"other",
                }
            ),
            "Muennighoff/flan": Repository(
                {
                    f"{split}/{name}_{split}.jsonl": flan
                    for split in ("train", "test")
                    for name in ("cb_10templates", "rte_10templates")
                }
            ),
            "akoksal/LongForm": Repository(
                {f"dataset/{name}.json": written for name in ("train", "val", "test")}
            ),
        },
    ) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_set_is_fetched_once(hub, tmp_path):
    found = find_conversations(Alpaca2k())
    assert (found.name, len(found.train), len(found.val)) == ("alpaca2k", 38, 2)
    assert (tmp_path / "data/alpaca2k/alpaca_2000.parquet").is_file()
    asked = len(hub.asked)
    assert len(find_conversations(Alpaca2k()).train) == 38
    assert len(hub.asked) == asked  # a machine without a network will do now


def test_another_repository_is_another_folder(hub, tmp_path):
    rows = json.dumps(ROWS[:20]).encode()
    hub.datasets["me/alpaca"] = Repository({"mine.json": rows})
    assert len(find_conversations(Alpaca2k(val_fraction=0.0)).train) == 40
    assert len(find_conversations(Alpaca2k(val_fraction=0.0, repo_id="me/alpaca")).train) == 20
    assert (tmp_path / "data/me--alpaca/mine.json").is_file()
    own = Alpaca2k(val_fraction=0.0, repo_id="me/alpaca", download_dir="data/alpaca2k")
    assert len(find_conversations(own).train) == 40  # what is there is not fetched again
    same = Alpaca2k(val_fraction=0.0, repo_id=Alpaca2k.repo)
    assert len(find_conversations(same).train) == 40
    assert not (tmp_path / "data/mhenrichsen--alpaca_2k_test").exists()


def test_sets_with_splits_of_their_own(hub):
    for data in (Deita(), LongForm()):
        found = find_conversations(data)
        assert (len(found.train), len(found.val)) == (1, 1)
    assert not hub.gets("train_gen")


def test_parts_of_a_set(hub, tmp_path):
    found = find_conversations(FLAN(subsets="cb_10templates"))
    assert (len(found.train), len(found.val)) == (1, 1)
    assert not hub.gets("rte_10templates")
    # Another part than what is there already is fetched, too.
    assert len(find_conversations(FLAN(subsets="cb_10templates,rte_10templates")).train) == 2
    assert len(find_conversations(FLAN(subsets="cb_10templates")).train) == 1


def test_without_a_hub_it_is_said_what_to_do(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        RunError, match=r"Without the hub, put the files of mhenrichsen.* into data"
    ):
        find_conversations(Alpaca2k())

"""Corpora that come when they are first named, and other commands of tutorials that need data."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest

from gristmill.config.data import OpenWebText, RedPajama, TinyStories
from gristmill.config.script_commands import MergeFiles
from gristmill.data.modules import open_datasets
from gristmill.data.raw import first_use, layouts
from gristmill.data.raw.fetch import STATE
from gristmill.data.store.dataset import Dataset
from gristmill.data.store.merge import merge
from gristmill.util.errors import RunError, UserError

from .conftest import make_text
from .fake_hub import Hub, Repository
from .made_datasets import make_dataset, write_litdata

STORIES = layouts.get("tinystories")


def archive(names=("data00.json", "data01.json")) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for n, name in enumerate(names):
            data = json.dumps([{"story": make_text(9 * n + i, 30)} for i in range(5)]).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    files = {"TinyStories_all_data.tar.gz": archive(), "README.md": b"x"}
    with Hub(datasets={"roneneldan/TinyStories": Repository(files)}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_corpus_comes_once_and_is_unpacked(hub, tmp_path, tokenizer_dir, capsys):
    found = open_datasets(TinyStories(val_fraction=0.0), tokenizer_dir)
    assert found.train_corpus().datasets[0].num_documents == 10
    assert "fetching it once (gristmill download roneneldan/TinyStories" in capsys.readouterr().err
    asked = len(hub.asked)
    open_datasets(TinyStories(val_fraction=0.0), tokenizer_dir)
    assert len(hub.asked) == asked
    assert not list((tmp_path / "data/tinystories").rglob("*.part"))


def test_an_interrupted_corpus_is_fetched_to_its_end(hub, tmp_path, tokenizer_dir):
    path = tmp_path / "data/tinystories"
    (path / STATE).mkdir(parents=True)
    (path / STATE / first_use._MARK).touch()
    (path / "data00.json").write_text('[{"story": "half of it"}]')
    first_use.fetch(STORIES, path)
    assert hub.gets("all_data.tar.gz")
    assert not (path / STATE / first_use._MARK).exists()


def test_an_archive_that_somebody_fetched_is_unpacked(hub, tmp_path):
    path = tmp_path / "data/tinystories"
    path.mkdir(parents=True)
    (path / "TinyStories_all_data.tar.gz").write_bytes(archive())
    first_use.fetch(STORIES, path)
    assert not hub.asked
    assert (path / "data01.json").is_file()


def test_archives_that_lead_elsewhere_or_are_damaged(hub, tmp_path):
    path = tmp_path / "data/tinystories"
    path.mkdir(parents=True)
    for content in (archive(["../data00.json"]), archive()[:300], b"no archive"):
        (path / "TinyStories_all_data.tar.gz").write_bytes(content)
        with pytest.raises(RunError, match="does not unpack"):
            first_use.fetch(STORIES, path)
    assert not (tmp_path / "data/data00.json").exists()


def test_text_of_the_user_s_own_is_never_fetched_over(hub, tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match=r"there is no elsewhere\. name the corpus"):
        open_datasets(TinyStories(train_data_path="elsewhere"), tokenizer_dir)
    (tmp_path / "data/openwebtext").mkdir(parents=True)
    (tmp_path / "data/openwebtext/mine.txt").write_text("x")
    with pytest.raises(UserError):
        open_datasets(OpenWebText(), tokenizer_dir)
    assert not hub.asked


def test_without_a_network_the_command_is_named(monkeypatch, tmp_path, tokenizer_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*gristmill download Skylion007/"):
        open_datasets(OpenWebText(), tokenizer_dir)


def sets(folder, sizes):
    for name, count in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_dataset(folder / name, [[10, 30]] * count)


def weights(found):
    return {part.name: part.weight for part in found.train}


def test_the_sets_of_redpajama_have_lit_llamas_shares(tmp_path, tokenizer_dir):
    sets(tmp_path / "all", {"arxiv": 5, "common_crawl": 3, "wikipedia": 9})
    found = open_datasets(RedPajama(data_path=str(tmp_path / "all")), tokenizer_dir)
    assert weights(found) == {"arxiv": 2.5, "common_crawl": 67.0, "wikipedia": 4.5}
    assert found.val is None
    sets(tmp_path / "some", {"cc_2019-30_sample": 3, "cc_2023-06_sample": 1, "c4_sample": 4})
    cfg = RedPajama(data_path=str(tmp_path / "some"), val_data_path=str(tmp_path / "all"))
    found = open_datasets(cfg, tokenizer_dir)
    expected = {"cc_2019-30_sample": 50.25, "cc_2023-06_sample": 16.75, "c4_sample": 15.0}
    assert weights(found) == expected
    assert {part.name for part in found.val} == {"arxiv", "common_crawl", "wikipedia"}


def test_what_each_set_holds_out_is_validated_on(tmp_path, tokenizer_dir):
    sets(tmp_path, {"book/train": 4, "book/val": 1, "c4": 3})
    found = open_datasets(RedPajama(data_path=str(tmp_path)), tokenizer_dir)
    assert [part.name for part in found.val] == ["book"]
    assert found.val_corpus().num_tokens == 40


def test_a_folder_without_sets(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match=r"holds no prepared set of RedPajama \(arxiv, book"):
        open_datasets(RedPajama(data_path=str(tmp_path)), tokenizer_dir)


def test_a_dataset_of_ours_is_linked_whole(tmp_path, capsys):
    make_dataset(tmp_path / "made/train", [[1, 2, 3]] * 4)
    target = tmp_path / "data/merged/train"
    for _ in range(2):  # again is no error
        merge(MergeFiles(source_dir=str(tmp_path / "made/train"), target_dir=str(target)))
        assert "nothing to merge" in capsys.readouterr().out
    assert target.is_symlink()
    one, two = Dataset.open(target), Dataset.open(tmp_path / "made/train")
    assert one.manifest == two.manifest
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        merge(MergeFiles(source_dir=str(tmp_path / "made/train"), target_dir=str(other)))
    assert os.listdir(other) == ["notes.txt"]


def test_folders_of_nodes_become_one_and_stay(tmp_path, capsys):
    for node in range(3):
        write_litdata(tmp_path / f"train/{node}", [[[node] * 5] * 4])
    before = sorted(path.name for path in (tmp_path / "train").rglob("*"))
    cfg = MergeFiles(source_dir=str(tmp_path / "train"), target_dir=str(tmp_path / "merged"))
    merge(cfg)
    assert Dataset.open(tmp_path / "merged").num_tokens == 60
    assert sorted(path.name for path in (tmp_path / "train").rglob("*")) == before
    assert "stay in" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{}, {"source_dir": "a"}, {"target_dir": "b"}])
def test_a_merge_of_nothing(given):
    with pytest.raises(UserError, match="give both"):
        merge(MergeFiles(**given))

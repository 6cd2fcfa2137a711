from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from gristmill.config.data import DataModule, Jsonl, LitData, TextFiles
from gristmill.data import modules, prepare
from gristmill.data.modules import Datasets, open_datasets
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

from .conftest import make_text, save_tokenizer


def text_files(path, **options):
    return TextFiles(train_data_path=str(path), **{"num_workers": 1, "val_fraction": 0.1} | options)


def tokens(datasets: Datasets) -> int:
    return Dataset.open(datasets.train).num_tokens


@pytest.fixture
def preparations(monkeypatch):
    """Counts how often text is really prepared."""
    count = []
    build = prepare.build
    monkeypatch.setattr(
        modules, "build", lambda plan, job: count.append(job.out) or build(plan, job)
    )
    return count


def test_a_raw_folder_is_prepared_once_and_split(novels, tokenizer_dir, preparations, capsys):
    first = open_datasets(text_files(novels, seed=7), tokenizer_dir)
    assert first.train.parent.parent == novels / ".gristmill"
    assert first.seed == 7
    train, val = Dataset.open(first.train), Dataset.open(first.val)
    assert 0.02 < val.num_tokens / train.num_tokens < 0.3
    assert "preparing" in capsys.readouterr().err
    assert open_datasets(text_files(novels, seed=7), tokenizer_dir) == first
    assert "as prepared before in" in capsys.readouterr().out
    assert len(preparations) == 1


def test_an_unchanged_folder_is_not_read_again(novels, tokenizer_dir, monkeypatch):
    first = open_datasets(text_files(novels), tokenizer_dir)
    monkeypatch.setattr(modules, "make_plan", None)  # reading the inputs would fail
    assert open_datasets(text_files(novels), tokenizer_dir) == first


@pytest.mark.parametrize("change", ["contents", "new file", "removed", "tokenizer", "option"])
def test_whatever_changes_is_prepared_anew(change, novels, tokenizer_dir, preparations, tmp_path):
    data = text_files(novels)
    first = open_datasets(data, tokenizer_dir)
    path = novels / "a" / "03.txt"
    status = path.stat()
    if change == "contents":  # of the same size and time
        path.write_text(path.read_text().swapcase())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
    elif change == "new file":
        (novels / "a" / "zz.txt").write_text("One more.")
    elif change == "removed":
        path.unlink()
    elif change == "tokenizer":
        tokenizer_dir = save_tokenizer(tmp_path / "t", bos=None, eos="</s>", vocab_size=350)
    else:
        data = text_files(novels, bos="none")
    second = open_datasets(data, tokenizer_dir)
    assert len(preparations) == 2
    assert second.train != first.train
    assert Dataset.open(second.train).dataset_id != Dataset.open(first.train).dataset_id


def test_an_interrupted_preparation_goes_on(novels, tokenizer_dir, monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "finalize", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_datasets(text_files(novels), tokenizer_dir)
    monkeypatch.undo()
    open_datasets(text_files(novels), tokenizer_dir)
    assert "going on: 1 of 1 parts" in capsys.readouterr().err


def test_validation_text_of_its_own(novels, tokenizer_dir, tmp_path):
    other = tmp_path / "val.txt"
    other.write_text(make_text(99, 300))
    found = open_datasets(text_files(novels, val_data_path=str(other)), tokenizer_dir)
    assert Dataset.open(found.val).num_documents == 1
    assert Dataset.open(found.train).num_documents == 12
    inside = novels / "b"
    found = open_datasets(text_files(novels, val_data_path=str(inside)), tokenizer_dir)
    assert Dataset.open(found.train).num_documents == Dataset.open(found.val).num_documents == 6
    held = novels / "a" / "01.txt"
    found = open_datasets(text_files(novels, val_data_path=str(held)), tokenizer_dir)
    assert Dataset.open(found.train).num_documents == 11
    with pytest.raises(UserError, match="holds only the validation text"):
        open_datasets(text_files(held, val_data_path=str(held)), tokenizer_dir)


def test_one_file_is_enough(tmp_path, tokenizer_dir):
    novel = tmp_path / "novel.md"
    novel.write_text(make_text(1, 8000))
    found = open_datasets(text_files(novel), tokenizer_dir)
    assert Dataset.open(found.val).num_tokens > 100
    assert (tmp_path / ".gristmill").is_dir()


def test_no_validation(novels, tokenizer_dir, tmp_path, capsys):
    assert open_datasets(text_files(novels, val_fraction=0.0), tokenizer_dir).val is None
    short = tmp_path / "short.txt"
    short.write_text("A few words only.")
    assert open_datasets(text_files(short), tokenizer_dir).val is None
    assert "too few to hold some out" in capsys.readouterr().out


def test_jsonl(records, tokenizer_dir):
    data = Jsonl(train_data_path=str(records.parent), num_workers=1, val_fraction=0.2)
    found = open_datasets(data, tokenizer_dir)
    both = Dataset.open(found.train), Dataset.open(found.val)
    assert {d.manifest.source.layout for d in both} == {"jsonl"}
    assert open_datasets(data, tokenizer_dir) == found  # its own rejects.jsonl is no input
    data = Jsonl(train_data_path=str(records.parent), text_field="body")
    with pytest.raises(UserError, match="no field 'body'"):
        open_datasets(data, tokenizer_dir)


def test_the_cache_goes_where_it_can(novels, tokenizer_dir, tmp_path, monkeypatch):
    chosen = novels / "cache"
    first = open_datasets(text_files(novels, cache_dir=str(chosen)), tokenizer_dir)
    assert first.train.is_relative_to(chosen)
    assert open_datasets(text_files(novels, cache_dir=str(chosen)), tokenizer_dir) == first
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    home = Path(os.environ["XDG_CACHE_HOME"]) / "gristmill"
    assert open_datasets(text_files(novels), tokenizer_dir).train.is_relative_to(home)
    mkdir = Path.mkdir

    def read_only(path, *args, **kwargs):
        if path.name == ".gristmill":
            raise OSError(30, "Read-only file system")
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    shutil.rmtree(novels / ".gristmill")
    assert open_datasets(text_files(novels), tokenizer_dir).train.is_relative_to(home)


def test_errors_name_the_options_of_training(novels, tokenizer_dir):
    with pytest.raises(UserError, match=r"for example --data\.pattern '\*\*/\*\.txt'"):
        open_datasets(text_files(novels, pattern="*.md"), tokenizer_dir)
    with pytest.raises(UserError, match=r"^--data\.val_fraction 2 is no share"):
        open_datasets(text_files(novels, val_fraction=2), tokenizer_dir)
    (novels / "a" / "bad.txt").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"1 of 13 .*binary: 1.* more than 1%\. .*--data\.pattern"):
        open_datasets(text_files(novels, val_fraction=0.0), tokenizer_dir)


def test_no_processes_are_refused(novels, tokenizer_dir):
    for number in (0, -1):
        with pytest.raises(UserError, match=r"--data\.num_workers .* is too few"):
            open_datasets(text_files(novels, num_workers=number), tokenizer_dir)


def test_raw_text_needs_a_tokenizer(novels):
    with pytest.raises(UserError, match="--tokenizer_dir"):
        open_datasets(text_files(novels), None)


def test_prepared_datasets_by_their_folders(run_prepare, records, tmp_path):
    split = run_prepare("jsonl", records, tmp_path / "split", val_fraction=0.2)
    found = open_datasets(LitData(data_path=str(split)), None)
    assert found == Datasets(split / "train", split / "val", 42)
    assert tokens(found) > 0
    named = open_datasets(LitData(data_path=str(split), split_names=("val", "train")), None)
    assert (named.train, named.val) == (split / "val", split / "train")
    only = open_datasets(LitData(data_path=str(split / "train"), seed=1), None)
    assert only == Datasets(split / "train", None, 1)
    with pytest.raises(UserError, match=r"there is no folder .*dev \(there: train, val\)"):
        open_datasets(LitData(data_path=str(split), split_names=("train", "dev")), None)


def test_prepared_validation_data_beside_the_training_data(run_prepare, records, tmp_path):
    split = run_prepare("jsonl", records, tmp_path / "split", val_fraction=0.2)
    other = run_prepare("jsonl", records, tmp_path / "other")
    found = open_datasets(LitData(data_path=str(split), val_data_path=str(other)), None)
    assert (found.train, found.val) == (split / "train", other)
    # As TinyLlama's authors have it: one folder for both.
    found = open_datasets(LitData(data_path=str(split), val_data_path=str(split)), None)
    assert (found.train, found.val) == (split / "train", split / "val")
    with pytest.raises(UserError, match="is the training data, too"):
        open_datasets(LitData(data_path=str(other), val_data_path=str(other)), None)
    twice = LitData(data_path=str(split), split_names=("train", "val"), val_data_path=str(other))
    with pytest.raises(UserError, match="leave one of them out"):
        open_datasets(twice, None)


@dataclass
class Own(DataModule):
    result: object

    def datasets(self, tokenizer_dir):
        return self.result


def test_a_module_of_the_users_own():
    wanted = Datasets(Path("a"), None, 1)
    assert open_datasets(Own(wanted), None) is wanted
    with pytest.raises(UserError, match=r"Own.datasets gave a str"):
        open_datasets(Own("a"), None)
    with pytest.raises(UserError, match="DataModule has no method datasets"):
        open_datasets(DataModule(), None)

from __future__ import annotations

import json
import os
import shutil

import pytest

from gristmill.config.data_commands import DataImport
from gristmill.data.store import adopt, manifest, verify
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import RunError, UserError

from .conftest import save_tokenizer, tree
from .made_datasets import documents_of, make_dataset, write_litdata

ONE = [[[1, 2, 3], [4]], [[5, 6]]]
TWO = [[[7] * 9], [[8], [9, 10]]]


def do(*paths, **options):
    adopt.run(DataImport(input_dir=[str(path) for path in paths], **options))


def flat(*parts):
    return [document for chunks in parts for chunk in chunks for document in chunk]


def test_one_dataset_in_place_gets_a_manifest_and_stays_as_it_was(tmp_path, capsys):
    folder = write_litdata(tmp_path / "lit", ONE)
    before, bare = tree(folder), Dataset.open(folder).dataset_id
    do(folder)
    after = tree(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", "chunks.npy", "README.md"}
    dataset = Dataset.open(folder)
    assert dataset.dataset_id == bare  # a run that read it before goes on
    assert documents_of(dataset) == flat(ONE)
    assert "6 tokens (int32) in 2 chunks from 1 folder, where it is" in capsys.readouterr().out
    assert verify.problems(folder) == []
    do(folder)
    assert tree(folder) == after


@pytest.mark.parametrize("how", ["in place", "linked", "copied"])
def test_folders_of_nodes_become_one_dataset_for_each_split(tmp_path, how):
    guide = tmp_path / "guide"
    for split, first, second in (("train", ONE, TWO), ("val", TWO, ONE)):
        write_litdata(guide / split / "node-0", first)
        write_litdata(guide / split / "node-1", second)
    out = guide if how == "in place" else tmp_path / "out"
    before = tree(guide)
    options = {} if how == "in place" else {"output_dir": str(out), "copy": how == "copied"}
    do(guide, **options)
    for split, parts in (("train", (ONE, TWO)), ("val", (TWO, ONE))):
        dataset = Dataset.open(out / split)
        assert documents_of(dataset) == flat(*parts)
        assert dataset.manifest.whole_digests == (how == "copied")
        listed = json.loads((out / split / "index.json").read_text())["chunks"]
        assert [chunk["filename"] for chunk in listed] == [c.name for c in dataset.chunks]
        dims = [sum(map(len, chunk)) for part in parts for chunk in part]
        assert [chunk["dim"] for chunk in listed] == dims
        assert verify.problems(out / split) == []
    after = tree(guide)
    assert {name: after[name] for name in before} == before
    chunks = [out / "train" / chunk.name for chunk in Dataset.open(out / "train").chunks]
    assert all(path.is_symlink() == (how == "linked") for path in chunks)
    assert not (out / "train" / adopt.MARK).exists()


def test_documents_without_tokens_end_nothing(tmp_path):
    folder = write_litdata(tmp_path / "lit", [[[], [1, 2], [], [], [3], []]])
    do(folder)
    dataset = Dataset.open(folder)
    assert verify.problems(folder) == []
    assert dataset.map(0).ends_within(0, 3).tolist() == [2, 3]
    assert dataset.map(0).ends_within(2, 3).tolist() == [1]


def test_several_folders_need_a_place(tmp_path):
    one, two = write_litdata(tmp_path / "1", ONE), write_litdata(tmp_path / "2", TWO)
    with pytest.raises(UserError, match="--output_dir") as error:
        do(one, two)
    assert "--output_dir" in error.value.fix
    do(two, one, output_dir=str(tmp_path / "out"))
    assert documents_of(Dataset.open(tmp_path / "out")) == flat(TWO, ONE)
    with pytest.raises(UserError, match="is a dataset already"):
        do(two, one, output_dir=str(tmp_path / "out"))


def test_compressed_chunks_are_unpacked(tmp_path):
    folder = write_litdata(tmp_path / "lit", ONE, compression="zstd:3")
    with pytest.raises(UserError, match="compressed chunks") as error:
        do(folder, output_dir=str(tmp_path / "out"))
    assert error.value.fix == {"--copy": "true"}
    with pytest.raises(UserError, match=r"unpack them: gristmill data import .* --copy"):
        Dataset.open(folder)
    do(folder, output_dir=str(tmp_path / "out"), copy=True)
    dataset = Dataset.open(tmp_path / "out")
    assert documents_of(dataset) == flat(ONE)
    assert [chunk.name for chunk in dataset.chunks] == ["chunk-0-0.bin", "chunk-0-1.bin"]
    assert json.loads((dataset.path / "index.json").read_text())["config"]["compression"] is None


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_compressed_chunk_is_named_and_the_import_goes_on_later(tmp_path, damage):
    folder = write_litdata(tmp_path / "lit", [[[1] * 5000], [[2, 3]]], compression="zstd")
    path = folder / "chunk-0-1.zstd.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] if damage == "cut" else whole[:4] + b"\xff" * 9)
    with pytest.raises(UserError, match=r"chunk-0-1.*(damaged|decompress)"):
        do(folder, output_dir=str(tmp_path / "out"), copy=True)
    with pytest.raises(UserError):
        Dataset.open(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    path.write_bytes(whole)
    do(folder, output_dir=str(tmp_path / "out"), copy=True)
    assert documents_of(Dataset.open(tmp_path / "out")) == [[1] * 5000, [2, 3]]


def test_a_killed_copy_is_finished_by_the_same_command_only(tmp_path, monkeypatch):
    folder = write_litdata(tmp_path / "lit", ONE)
    reference, out = tmp_path / "reference", tmp_path / "out"
    do(folder, output_dir=str(reference), copy=True)

    class Killed(BaseException):
        pass

    def kill(source, target):
        if "chunk-0-1" in str(source):
            raise Killed
        return replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            do(folder, output_dir=str(out), copy=True)
    assert (out / adopt.MARK).exists()
    with pytest.raises(UserError, match="is not empty"):
        do(folder, output_dir=str(out))
    do(folder, output_dir=str(out), copy=True)
    assert tree(out) == tree(reference)


def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    folder = write_litdata(tmp_path / "lit", ONE)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(adopt.Storage, "write", refuse)  # root may write anywhere
        with pytest.raises(UserError, match=r"cannot be written.*linked, not copied") as error:
            do(folder)
    assert "--output_dir" in error.value.fix
    do(folder, output_dir=str(tmp_path / "out"))
    assert documents_of(Dataset.open(tmp_path / "out")) == flat(ONE)


def test_a_tokenizer_travels_with_the_tokens_and_its_ids_are_checked(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", bos="<s>", eos="</s>")
    folder = write_litdata(tmp_path / "lit", ONE)
    do(folder, output_dir=str(tmp_path / "out"), tokenizer_dir=str(tokenizer))
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.num_token_ids == 400
    assert dataset.tokenizer_dir is not None
    assert verify.problems(dataset.path) == []
    write_litdata(tmp_path / "high", [[[1, 400]]])
    with pytest.raises(UserError, match="id 400, above the largest"):
        do(tmp_path / "high", tokenizer_dir=str(tokenizer))
    assert not (tmp_path / "high" / "manifest.json").exists()


def test_cut_documents_of_our_own_datasets_stay_cut(tmp_path):
    ours = make_dataset(tmp_path / "ours", [[4], [3, 2]], cut=0)
    with pytest.raises(UserError, match="needs no import"):
        do(ours.path)
    write_litdata(tmp_path / "lit", ONE, name="uint16", kind="no_header_numpy:5")
    do(ours.path, tmp_path / "lit", output_dir=str(tmp_path / "out"))
    chunks = Dataset.open(tmp_path / "out").chunks
    assert [chunk.continues for chunk in chunks] == [True, False, False, False]


def test_what_cannot_be_imported_is_explained(tmp_path):
    with pytest.raises(UserError, match="name what to import"):
        do()
    with pytest.raises(UserError, match="there is no folder"):
        do(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not on this machine"):
        do("s3://bucket/data")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "chunk-0-0.bin").write_bytes(b"\1\0\0\0")
    with pytest.raises(UserError, match=r"no index.json; 1 .bin files lie there"):
        do(tmp_path / "text")
    write_litdata(tmp_path / "a", ONE)
    write_litdata(tmp_path / "b", ONE, name="uint16", kind="no_header_numpy:5")
    with pytest.raises(UserError, match="has uint16 tokens, .* int32: a dataset has one type"):
        do(tmp_path / "a", tmp_path / "b", output_dir=str(tmp_path / "out"))
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    index["chunks"][0]["dim"] = None
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"without item_loader=TokensLoader\(\)"):
        do(tmp_path / "a")
    write_litdata(tmp_path / "mixed" / "train", ONE)
    with pytest.raises(UserError, match="some are not"):
        do(tmp_path / "mixed", tmp_path / "b", output_dir=str(tmp_path / "out"))


def test_a_disk_that_is_too_small_is_refused_first(tmp_path, monkeypatch):
    folder = write_litdata(tmp_path / "lit", ONE)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="no space left"):
        do(folder, output_dir=str(tmp_path / "out"), copy=True)
    do(folder, output_dir=str(tmp_path / "links"))
    assert manifest.read(tmp_path / "links").totals.tokens == 6

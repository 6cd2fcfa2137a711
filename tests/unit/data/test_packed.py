from __future__ import annotations

import shlex
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gristmill.config.commands import Pretrain
from gristmill.config.data import RedPajama
from gristmill.config.data_commands import DataImport
from gristmill.config.parse import parse
from gristmill.data.look.lengths import document_lengths
from gristmill.data.modules import open_datasets
from gristmill.data.store import adopt, packed, verify
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

SEPARATOR = 2


def write_packed(folder, prefix, stream, *, size=8, code=8, version=1):
    """A stream of ids as lit-llama's builder writes it: full files, the last one filled up."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 8: "<u2"}
    for number in range(-(-len(stream) // size)):
        ids = np.full(size, SEPARATOR, dtype=kinds[code])
        part = stream[number * size : (number + 1) * size]
        ids[: len(part)] = part
        header = b"LITPKDS" + struct.pack("<QBQ", version, code, size)
        (folder / f"{prefix}_{number:010d}.bin").write_bytes(header + ids.tobytes())
    return folder


def do(folder, out):
    adopt.run(DataImport(input_dir=str(folder), output_dir=str(out), copy=True))
    return Dataset.open(out)


def tokens_of(dataset):
    return [dataset.map(n).tokens.tolist() for n in range(len(dataset.chunks))]


@pytest.mark.parametrize(("code", "dtype"), [(1, "uint16"), (8, "uint16"), (4, "uint32")])
def test_packed_files_become_chunks_without_their_padding(tmp_path, code, dtype):
    stream = list(range(10, 29))
    folder = write_packed(tmp_path / "packed", "train_wiki", stream, code=code)
    dataset = do(folder, tmp_path / "out")
    # One separator stays: a document may have ended with it.
    assert tokens_of(dataset) == [stream[:8], stream[8:16], [*stream[16:], SEPARATOR]]
    assert dataset.dtype == dtype
    assert [chunk.continues for chunk in dataset.chunks] == [True, True, False]
    assert dataset.map(0).ends_within(0, 8).tolist() == []
    assert dataset.num_documents == 1  # nothing says where they end
    assert verify.problems(tmp_path / "out") == []


def test_a_last_file_of_padding_leaves_nothing_to_go_on_with(tmp_path):
    stream = [*range(10, 26), SEPARATOR]
    dataset = do(write_packed(tmp_path / "packed", "train", stream), tmp_path / "out")
    assert tokens_of(dataset) == [stream[:8], stream[8:16]]
    assert [chunk.continues for chunk in dataset.chunks] == [True, False]
    assert document_lengths(dataset).longest == 16
    assert dataset.num_documents == 1


def test_prefixes_are_streams_of_their_own(tmp_path):
    folder = tmp_path / "packed"
    write_packed(folder, "train_10", list(range(100, 110)))
    write_packed(folder, "train_9", list(range(50, 66)))
    dataset = do(folder, tmp_path / "out")
    assert [chunk.continues for chunk in dataset.chunks] == [True, False, True, False]
    assert [chunk.tokens for chunk in dataset.chunks] == [8, 3, 8, 8]


def test_files_of_nothing_but_padding_are_left_out(tmp_path):
    write_packed(tmp_path / "packed", "a_0", [5, 6, 7, 8, 9, 10, 11, 12])
    write_packed(tmp_path / "packed", "a_1", [SEPARATOR] * 3)
    assert tokens_of(do(tmp_path / "packed", tmp_path / "out")) == [[5, 6, 7, 8, 9, 10, 11, 12]]


def test_long_padding_is_found_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_BLOCK", 3)
    for length in range(1, 12):
        folder = write_packed(tmp_path / str(length), "a", list(range(10, 10 + length)), size=11)
        (found,) = tokens_of(do(folder, tmp_path / f"out-{length}"))
        assert found == [*range(10, 10 + length), *[SEPARATOR] * (length < 11)]


def test_types_of_several_prefixes_meet_in_the_wider(tmp_path):
    write_packed(tmp_path / "packed", "a_0", [1] * 7 + [3], code=8)
    write_packed(tmp_path / "packed", "a_1", [70_000] * 7 + [3], code=4)
    dataset = do(tmp_path / "packed", tmp_path / "out")
    assert dataset.dtype == "uint32"
    assert tokens_of(dataset) == [[1] * 7 + [3], [70_000] * 7 + [3]]


def trained_on(command):
    """The datasets that the printed command reads, with their weights, validation and all."""
    words = shlex.split(command.partition("Next: gristmill ")[2])
    data = parse(Pretrain, words[1:], prog="", positionals=("model_name",)).data
    found = open_datasets(data, None)
    assert found.train_corpus().num_tokens
    return found


def test_each_set_of_lit_llama_becomes_a_dataset_of_its_own(tmp_path, capsys):
    folder = tmp_path / "lit-redpajama"
    for n, name in enumerate(("arxiv", "common_crawl", "wikipedia")):
        write_packed(folder, name, [n] * 19)
    out = tmp_path / "redpajama"
    adopt.run(DataImport(input_dir=str(folder), output_dir=str(out), copy=True))
    assert {path.name for path in out.iterdir()} == {"arxiv", "common_crawl", "wikipedia"}
    assert tokens_of(Dataset.open(out / "common_crawl"))[0] == [1] * 8
    weights = {"arxiv": 2.5, "common_crawl": 67.0, "wikipedia": 4.5}
    found = trained_on(capsys.readouterr().out)
    assert {Path(part.path).name: part.weight for part in found.train} == weights
    assert found.val is None
    # As lit-llama's trainer names them.
    named = open_datasets(RedPajama(data_path=str(out)), None)
    assert {part.name: part.weight for part in named.train} == weights


def test_the_one_folder_of_tinyllama_becomes_a_dataset_for_each_corpus_and_side(tmp_path, capsys):
    folder = tmp_path / "slim_star"
    for process in (0, 1):
        write_packed(folder, f"train_slimpajama_{process}", list(range(10, 26)))
        write_packed(folder, f"train_starcoder_{process}", list(range(30, 46)))
    write_packed(folder, "validation_slimpajama_0", list(range(50, 66)))
    adopt.run(DataImport(input_dir=str(folder), output_dir=str(tmp_path / "data"), copy=True))
    assert Dataset.open(tmp_path / "data/slimpajama/train").num_tokens == 2 * 16
    assert tokens_of(Dataset.open(tmp_path / "data/slimpajama/val"))[0] == list(range(50, 58))
    found = trained_on(capsys.readouterr().out)
    assert {Path(p.path).parent.name: p.weight for p in found.train} == {
        "slimpajama": 69.3584,
        "starcoder": 30.6416,
    }
    assert [Path(p.path).parts[-2:] for p in found.val] == [("slimpajama", "val")]


def test_sets_that_nobody_knows_are_mixed_by_their_tokens():
    assert packed.shares({"arxiv": 300, "mine": 100}) == {"arxiv": 75.0, "mine": 25.0}


def test_sides_by_their_names_are_no_corpora(tmp_path, capsys):
    for name in ("train", "val"):
        write_packed(tmp_path / "packed", name, [1] * 7 + [3])
    adopt.run(
        DataImport(input_dir=str(tmp_path / "packed"), output_dir=str(tmp_path / "o"), copy=True)
    )
    assert f"--data LitData --data.data_path {tmp_path / 'o'}\n" in capsys.readouterr().out
    assert Dataset.open(tmp_path / "o/val").num_tokens == 8


def test_an_import_of_several_sets_goes_on_after_a_kill(tmp_path, monkeypatch):
    folder, out = tmp_path / "packed", tmp_path / "out"
    for name in ("arxiv", "book"):
        write_packed(folder, name, [1] * 7 + [3])
    do = partial(adopt.run, DataImport(input_dir=str(folder), output_dir=str(out), copy=True))
    convert, broken = packed.convert, RuntimeError("killed")

    def kill(file, *more):
        if "book" in file.path.name:
            raise broken
        return convert(file, *more)

    with monkeypatch.context() as patched:
        patched.setattr(packed, "convert", kill)
        with pytest.raises(RuntimeError):
            do()
    assert Dataset.open(out / "arxiv").num_tokens == 8
    do()
    assert Dataset.open(out / "book").num_tokens == 8
    assert not list(out.rglob(adopt.MARK))
    with pytest.raises(UserError, match="is a dataset already"):
        do()


def test_packed_files_that_training_is_given_are_named(tmp_path):
    write_packed(tmp_path / "packed", "train_slim", [1] * 8)
    with pytest.raises(UserError, match=r"packed files .*gristmill data import .*packed --copy"):
        Dataset.open(tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "ids", "message"),
    [
        ({"code": 4}, [-1, *range(7)], "holds the token id -1"),
        ({"code": 5}, [2**33, *range(7)], "holds the token id 8589934592"),
        ({"code": 6}, [1] * 8, "elements of type 6"),
        ({"version": 2}, [1] * 8, "format version 2"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path, options, ids, message):
    folder = write_packed(tmp_path / "packed", "a", ids, **options)
    with pytest.raises(UserError, match=message):
        do(folder, tmp_path / "out")


@pytest.mark.parametrize("length", [12, 30])
def test_a_file_cut_short_is_refused(tmp_path, length):
    folder = write_packed(tmp_path / "packed", "a", [1] * 8)
    path = folder / "a_0000000000.bin"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="is damaged"):
        do(folder, tmp_path / "out")


def test_packed_files_are_not_read_where_they_are(tmp_path):
    folder = write_packed(tmp_path / "packed", "a", [1] * 8)
    with pytest.raises(UserError, match="turn them into chunks") as error:
        adopt.run(DataImport(input_dir=str(folder)))
    assert error.value.fix["--copy"] == "true"

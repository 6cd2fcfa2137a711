from __future__ import annotations

import dataclasses
import json
import os
import resource

import numpy as np
import pytest

from gristmill.data.storage import Storage
from gristmill.data.store import manifest
from gristmill.data.store.chunk_table import ChunkTable
from gristmill.data.store.chunks import ChunkRecord
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import RunError, UserError

from .made_datasets import make_dataset, write_litdata


def adopted(folder, tokens):
    """A litdata token dataset of one document."""
    return write_litdata(folder, [[tokens]])


@pytest.fixture
def prepared(tmp_path):
    make_dataset(tmp_path / "prepared", [[3, 4], [100]])
    return tmp_path / "prepared"


def test_a_manifest_reads_as_it_was_written(prepared):
    read = manifest.read(prepared)
    assert manifest.to_json(read) == (prepared / "manifest.json").read_text()
    assert manifest.read(Storage(prepared)) == read
    table = ChunkTable.read(prepared, read.chunk_table, 2)
    assert table.to_bytes() == (prepared / "chunks.npy").read_bytes()
    assert read.dataset_id == table.dataset_id(read.dtype)


def test_a_table_is_mapped_and_gives_records_back(tmp_path):
    records = [
        ChunkRecord(f"chunk-{n:0{1 + n % 9}}.bin", n, 2 * n, 3 * n, f"{n:032x}", n % 3 == 0)
        for n in range(20_000)
    ]
    table = ChunkTable.of(iter(records))
    (tmp_path / "chunks.npy").write_bytes(table.to_bytes())
    for place in (tmp_path, Storage(tmp_path)):
        read = ChunkTable.read(place, table.digest, len(records))
        assert list(read) == records
        assert [read[n] for n in (0, 7, -1)] == [records[n] for n in (0, 7, -1)]
        assert read.tokens.tolist() == list(range(20_000))
        assert read.sizes.sum() == 3 * read.tokens.sum()
        assert read.digest == table.digest
    assert np.load(tmp_path / "chunks.npy", mmap_mode="r").dtype["xxh3"].itemsize == 16
    parted = ChunkTable.of([*records[:7], *records[7:]])
    assert parted.to_bytes() == table.to_bytes()


def test_the_identity_is_of_contents_and_their_order(prepared):
    table = Dataset.open(prepared).chunks
    one, two = table
    known = table.dataset_id("uint16")
    renamed = dataclasses.replace(one, name="other.bin")
    assert ChunkTable.of([renamed, two]).dataset_id("uint16") == known
    for other in (
        [two, one],
        [dataclasses.replace(one, xxh3="0" * 32), two],
        [dataclasses.replace(one, continues=True), two],
    ):
        assert ChunkTable.of(other).dataset_id("uint16") != known
    assert table.dataset_id("uint32") != known


@pytest.mark.parametrize("length", [10, 130, 200])
def test_a_damaged_table_is_found_at_open(prepared, length):
    path = prepared / "chunks.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(RunError, match=r"chunks\.npy is (damaged|not the table)"):
        Dataset.open(prepared)
    path.write_bytes(whole[:-3] + b"x" + whole[-2:])
    with pytest.raises(RunError, match="not the table that the manifest beside it names"):
        Dataset.open(prepared)
    path.unlink()
    with pytest.raises(RunError, match=r"chunks\.npy is missing"):
        Dataset.open(prepared)


def test_more_chunks_than_open_files(tmp_path):
    dataset = make_dataset(tmp_path / "many", [[2]] * 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, used + 300), hard))
    try:
        assert [int(dataset.map(n).tokens[0]) for n in range(400)] == list(range(0, 800, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_identity_moves_with_the_data(prepared, tmp_path):
    moved = prepared.rename(tmp_path / "moved")
    assert Dataset.open(moved).dataset_id == manifest.read(moved).dataset_id


def test_adopted_datasets(tmp_path):
    dataset = Dataset.open(adopted(tmp_path, [5, 70_000, 3]))
    assert (dataset.num_tokens, dataset.num_documents, dataset.dtype) == (3, 1, "int32")
    assert dataset.num_token_ids == 70_001
    assert dataset.text_bytes is None
    assert dataset.tokenizer_dir is None
    other = tmp_path / "other"
    other.mkdir()
    assert Dataset.open(adopted(other, [5, 70_000, 4])).dataset_id != dataset.dataset_id
    assert not (tmp_path / "manifest.json").exists()


def test_a_negative_id_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds the token id -1"):
        _ = Dataset.open(adopted(tmp_path, [5, -1])).num_token_ids


def test_a_dataset_without_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokens \(1 chunks\)"):
        Dataset.open(adopted(tmp_path, []))


def test_a_chunk_that_is_missing_or_short_is_found_at_open(prepared):
    chunk = prepared / Dataset.open(prepared).chunks[0].name
    data = chunk.read_bytes()
    chunk.write_bytes(data[:20])
    with pytest.raises(RunError, match=rf"{chunk.name} is damaged: it has 20 bytes"):
        Dataset.open(prepared)
    chunk.unlink()
    with pytest.raises(RunError, match=rf"cannot read .*{chunk.name}"):
        Dataset.open(prepared)


def test_what_is_no_dataset_is_explained(prepared, tmp_path):
    with pytest.raises(UserError, match="there is no dataset"):
        Dataset.open(tmp_path / "nowhere")
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match=r"neither manifest.json nor index.json.*--data TextFiles"):
        Dataset.open(tmp_path / "text")
    (tmp_path / "both").mkdir()
    prepared.rename(tmp_path / "both" / "train")
    with pytest.raises(UserError, match=r"holds the datasets train. name .*both/train"):
        Dataset.open(tmp_path / "both")


def test_foreign_and_newer_manifests_are_explained(prepared):
    path = prepared / "manifest.json"
    value = json.loads(path.read_text())
    for change, message in (
        ({"version": 99}, "has format version 99, this gristmill reads 2"),
        ({"format": "web-extension"}, "is not a gristmill manifest"),
        ({"totals": 3}, "is no manifest of a dataset"),
    ):
        path.write_text(json.dumps(value | change))
        with pytest.raises(UserError, match=message):
            Dataset.open(prepared)
    path.write_text("{")
    with pytest.raises(UserError, match="is no manifest of a dataset"):
        Dataset.open(prepared)

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from gristmill.data import manifest
from gristmill.data.dataset import Dataset
from gristmill.util.errors import RunError, UserError


def adopted(folder, tokens, name="int32", kind="no_header_tensor:16"):
    """A litdata token dataset of one document."""
    data = np.array(tokens, dtype=name).tobytes()
    (folder / "chunk-0-0.bin").write_bytes(struct.pack("<III", 1, 12, 12 + len(data)) + data)
    listed = {"chunk_bytes": 12 + len(data), "chunk_size": 1, "dim": len(tokens)}
    config = {"compression": None, "data_format": [kind], "item_loader": "TokensLoader"}
    index = {"chunks": [listed | {"filename": "chunk-0-0.bin"}], "config": config}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def prepared(run_prepare, records, tmp_path):
    return run_prepare("jsonl", records, tmp_path / "prepared")


def test_a_manifest_reads_as_it_was_written(prepared):
    read = manifest.read(prepared)
    assert manifest.to_json(read) == (prepared / "manifest.json").read_text()
    assert read.dataset_id == manifest.dataset_id(read.chunks, read.dtype)


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
    chunk.write_bytes(data[:100])
    with pytest.raises(RunError, match=rf"{chunk.name} is damaged: it has 100 bytes"):
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
        ({"version": 99}, "has format version 99, this gristmill reads 1"),
        ({"format": "web-extension"}, "is not a gristmill manifest"),
        ({"chunks": 3}, "is no manifest of a dataset"),
    ):
        path.write_text(json.dumps(value | change))
        with pytest.raises(UserError, match=message):
            Dataset.open(prepared)
    path.write_text("{")
    with pytest.raises(UserError, match="is no manifest of a dataset"):
        Dataset.open(prepared)

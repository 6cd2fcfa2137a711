from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gristmill.config.data_commands import DataImport, DataVerify
from gristmill.data.storage import Storage
from gristmill.data.store import adopt, chunk_table, manifest, verify
from gristmill.data.store.chunk_table import ChunkTable
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import RunError, UserError

from .conftest import save_tokenizer, tree
from .made_datasets import make_dataset, write_litdata


@pytest.fixture
def sound(tmp_path):
    folder = make_dataset(tmp_path / "data", [[3, 4], [100], [5, 5]]).path
    assert verify.problems(folder, num_workers=2) == []
    return folder


def change_chunk(folder, at, value, number=1):
    path = folder / f"chunk-{number}.bin"
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


def rewrite(folder, **changes):
    text = manifest.to_json(dataclasses.replace(manifest.read(folder), **changes))
    (folder / "manifest.json").write_text(text)


def test_a_flipped_bit_is_found_anywhere(sound):
    whole = (sound / "chunk-1.bin").read_bytes()
    for at in (12, 100, len(whole) - 1):
        change_chunk(sound, at, bytes([whole[at] ^ 1]))
        assert any("its digest differs" in line for line in verify.problems(sound))
        (sound / "chunk-1.bin").write_bytes(whole)
    assert verify.problems(sound) == []


def test_missing_and_short_chunks_are_listed_together(sound):
    (sound / "chunk-0.bin").unlink()
    change_chunk(sound, 0, b"\7")
    (sound / "chunk-2.bin").write_bytes(b"")
    found = verify.problems(sound)
    assert len(found) == 3
    assert [f"chunk-{n}.bin" in line for n, line in enumerate(found)] == [True] * 3


def test_ids_and_offsets_out_of_range_are_found(tmp_path):
    folder = write_litdata(tmp_path / "lit", [[[5, 6], [7]]])
    tokenizer = save_tokenizer(tmp_path / "tokenizer", bos=None, eos=None)
    adopt.run(DataImport(input_dir=str(folder), tokenizer_dir=str(tokenizer)))
    path = folder / "chunk-0-0.bin"
    whole = path.read_bytes()
    for at, value, message in (
        (len(whole) - 4, 400, "holds the token id 400, not 0 to 399"),
        (len(whole) - 4, 2**32 - 1, "holds the token id -1"),
        (8, 10**6, "offsets are damaged"),
    ):
        path.write_bytes(whole[:at] + value.to_bytes(4, "little") + whole[at + 4 :])
        found = verify.problems(folder)
        assert any(message in line for line in found), (message, found)
        assert any("its digest differs" in line for line in found)


def test_manifest_table_index_and_tokenizer_must_agree(sound, tmp_path):
    contents = manifest.read(sound)
    rewrite(sound, dataset_id="0" * 64)
    assert ["dataset id" in line for line in verify.problems(sound)] == [True]
    totals = dataclasses.replace(contents.totals, tokens=118)
    rewrite(sound, dataset_id=contents.dataset_id, totals=totals)
    assert verify.problems(sound) == [f"{sound / 'manifest.json'}: 118 tokens, the chunks 117"]
    rewrite(sound, totals=contents.totals)
    index = json.loads((sound / "index.json").read_text())
    index["chunks"].reverse()
    (sound / "index.json").write_text(json.dumps(index))
    assert ["lists other chunks" in line for line in verify.problems(sound)] == [True]
    (sound / "index.json").write_text("{")
    assert ["cannot be read" in line for line in verify.problems(sound)] == [True]


def test_a_tokenizer_that_was_exchanged_is_found(tmp_path):
    folder = write_litdata(tmp_path / "lit", [[[5, 6], [7]]])
    tokenizer = save_tokenizer(tmp_path / "tokenizer", bos=None, eos=None)
    adopt.run(DataImport(input_dir=str(folder), tokenizer_dir=str(tokenizer)))
    save_tokenizer(folder / "tokenizer", bos="<s>", eos=None)
    assert ["not the tokenizer" in line for line in verify.problems(folder)] == [True]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert len(verify.problems(folder)) == 1


def test_a_large_table_is_only_checked_here(sound, monkeypatch):
    monkeypatch.setattr(chunk_table, "_CHECKED_BYTES", 0)
    rows = np.load(sound / "chunks.npy")
    rows["continues"][0] = True
    (sound / "chunks.npy").write_bytes(ChunkTable(rows).to_bytes())
    assert len(Dataset.open(sound).chunks) == 3
    assert any("chunks.npy is not the table" in line for line in verify.problems(sound))


def test_datasets_on_an_object_store_are_checked_too(sound, tmp_path):
    store = Storage(f"memory://{tmp_path.name}")
    for name, data in tree(sound).items():
        store.write(f"train/{name}", data)
    verify.run(DataVerify(data_path=store.root))
    store.write("train/chunk-0.bin", (sound / "chunk-0.bin").read_bytes()[:-2] + b"\0\0")
    store.remove("train/chunk-1.bin")
    store.write("train/chunk-2.bin", b"short")
    for number, (line, problem) in enumerate(
        zip(
            verify.problems(store.at("train"), num_workers=2),
            ("has other contents", "cannot be read", "is damaged: it has 5 bytes"),
            strict=True,
        )
    ):
        assert line.startswith(f"{store.at(f'train/chunk-{number}.bin')} {problem}")


def test_the_command_names_what_is_wrong_and_fails(sound, tmp_path, capsys):
    make_dataset(tmp_path / "both" / "train", [[3]])
    make_dataset(tmp_path / "both" / "val", [[4]])
    verify.run(DataVerify(data_path=[str(tmp_path / "both"), str(sound)]))
    out = capsys.readouterr().out
    assert [line.endswith(": sound") for line in out.splitlines()] == [True] * 3
    (tmp_path / "both" / "val" / "chunk-0.bin").unlink()
    with pytest.raises(RunError, match=r"1 of what the manifests say.*\n.*val/chunk-0\.bin"):
        verify.run(DataVerify(data_path=str(tmp_path / "both"), num_workers=1))
    with pytest.raises(UserError, match="there is no dataset"):
        verify.run(DataVerify(data_path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="name a dataset"):
        verify.run(DataVerify())
    with pytest.raises(UserError, match="--num_workers 0"):
        verify.run(DataVerify(data_path=str(sound), num_workers=0))

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.store.chunks import (
    MAX_CHUNK_TOKENS,
    adopt,
    dtype_for,
    index_json,
    map_chunk,
    write_chunk,
)
from gristmill.util.errors import RunError, UserError


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.sampled_from(["uint16", "uint32"]),
    st.booleans(),
)
def test_a_chunk_reads_as_it_was_written(tmp_path_factory, lengths, dtype, continues):
    path = tmp_path_factory.mktemp("chunk") / "c.bin"
    tokens = np.random.default_rng(0).integers(0, 60000, size=sum(lengths))
    counted = np.array(lengths, dtype=np.int64)
    half = len(tokens) // 2
    record = write_chunk(path, [tokens[:half], tokens[half:]], counted, dtype, continues=continues)
    assert record.tokens == len(tokens)
    assert record.documents == len(lengths)
    assert record.bytes == path.stat().st_size
    mapped = map_chunk(path, record, dtype)
    assert mapped.tokens.tolist() == tokens.tolist()
    assert mapped.ends.tolist() == np.cumsum(lengths).tolist()
    ended = mapped.ends[:-1] if continues else mapped.ends
    for start in range(0, len(tokens), 7):
        expected = [e - start for e in ended.tolist() if start < e <= start + 9]
        assert mapped.ends_within(start, start + 9).tolist() == expected


def test_the_bytes_are_those_of_the_format(tmp_path):
    path = tmp_path / "c.bin"
    write_chunk(path, [np.array([1, 2, 300])], np.array([2, 1]), "uint16")
    assert path.read_bytes() == struct.pack("<IIIIHHH", 2, 16, 20, 22, 1, 2, 300)


def test_the_largest_chunk_has_offsets_of_32_bits():
    assert 4 * (MAX_CHUNK_TOKENS + 2) + 4 * MAX_CHUNK_TOKENS < 2**32


def test_a_document_without_tokens_is_never_written(tmp_path):
    with pytest.raises(AssertionError, match="without tokens"):
        write_chunk(tmp_path / "c.bin", [np.array([1])], np.array([1, 0]), "uint16")


@pytest.mark.parametrize(
    ("ids", "dtype"), [(65535, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_largest_id_decides_the_type(ids, dtype):
    assert dtype_for(ids) == dtype


def test_a_damaged_chunk_is_named(tmp_path):
    path = tmp_path / "c.bin"
    record = write_chunk(path, [np.arange(9)], np.array([4, 5]), "uint16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=r"c\.bin is damaged: it has 33 bytes"):
        map_chunk(path, record, "uint16")
    path.write_bytes(b"\1" + whole[1:])
    with pytest.raises(RunError, match="header does not agree"):
        map_chunk(path, record, "uint16")
    path.unlink()
    with pytest.raises(RunError, match=r"cannot read .*c\.bin"):
        map_chunk(path, record, "uint16")


@pytest.fixture
def litdata(tmp_path):
    """A token dataset in litdata's form, int32 as LitGPT writes it, and its index for changing."""
    tokens = np.arange(30, dtype="<i4")
    chunk = struct.pack("<IIII", 2, 16, 16 + 80, 16 + 120) + tokens.tobytes()
    (tmp_path / "chunk-0-0.bin").write_bytes(chunk)
    listed = {"chunk_bytes": 136, "chunk_size": 2, "dim": 30, "filename": "chunk-0-0.bin"}
    config = {"compression": None, "data_format": ["no_header_tensor:16"], "encryption": None}
    index = {"chunks": [listed], "config": config | {"item_loader": "TokensLoader"}}
    save(tmp_path, index)
    return tmp_path, index


def save(folder, index):
    (folder / "index.json").write_text(json.dumps(index))


def test_adopting_reads_headers_only(litdata):
    folder, _ = litdata
    (record,), dtype = adopt(folder)
    assert dtype == "int32"
    assert (record.tokens, record.documents, record.bytes) == (30, 2, 136)
    mapped = map_chunk(folder / record.name, record, dtype)
    assert mapped.tokens.tolist() == list(range(30))
    assert mapped.ends.tolist() == [20, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compression": "zstd"}, "compressed"),
        ({"encryption": "fernet"}, "encrypted"),
        ({"item_loader": "PyTreeLoader"}, r"without item_loader=TokensLoader\(\)"),
        ({"data_format": ["no_header_tensor:16", "int"]}, "not one array"),
        ({"data_format": ["jpeg"]}, "not one array"),
    ],
)
def test_what_cannot_be_adopted_is_explained(litdata, change, message):
    folder, index = litdata
    index["config"] |= change
    save(folder, index)
    with pytest.raises(UserError, match=message):
        adopt(folder)


def test_a_null_dim_is_explained(litdata):
    folder, index = litdata
    index["chunks"][0]["dim"] = None
    save(folder, index)
    with pytest.raises(UserError, match="dim is null"):
        adopt(folder)


@pytest.mark.parametrize("change", [{"dim": 29}, {"chunk_size": 3}])
def test_an_index_that_disagrees_is_refused(litdata, change):
    folder, index = litdata
    index["chunks"][0] |= change
    save(folder, index)
    with pytest.raises(UserError, match="damaged or incomplete"):
        adopt(folder)


def test_missing_and_broken_parts_are_named(litdata):
    folder, index = litdata
    (folder / "chunk-0-0.bin").unlink()
    with pytest.raises(UserError, match=r"chunk-0-0\.bin, which cannot be read"):
        adopt(folder)
    save(folder, index | {"chunks": []})
    with pytest.raises(UserError, match="no chunks"):
        adopt(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="no index that litdata wrote"):
        adopt(folder)


def test_the_index_is_the_same_anywhere(tmp_path):
    record = write_chunk(tmp_path / "c.bin", [np.arange(9)], np.array([4, 5]), "uint32")
    text = index_json([record], "uint32", 2**24, "ab" * 32)
    assert text == index_json([record], "uint32", 2**24, "ab" * 32)
    assert json.loads(text)["config"]["data_format"] == ["no_header_numpy:6"]
    assert json.loads(text)["updated_at"].isdigit()

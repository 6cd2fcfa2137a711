import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.formats.safetensors_io import open_tensors, read_header, weight_files, write_file
from gristmill.util.errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(8.0).view(4, 2)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read(directory: Path) -> dict[str, torch.Tensor]:
    return dict(open_tensors(weight_files(directory)))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tensors_are_read(file):
    assert_equal(read(file.parent), TENSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_written_files_are_read_by_safetensors(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    tensors = TENSORS | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    tensors["turned"] = torch.arange(12.0).view(3, 4).t()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_file(path, shapes, dtype, tensors.__getitem__)
    assert_equal(load_file(path), {name: t.to(dtype) for name, t in tensors.items()})
    read_header(path)


def test_wrong_shape_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match=r"a is \(2, 3\)"):
        write_file(tmp_path / "x", {"a": (3, 2)}, torch.float32, TENSORS.__getitem__)


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_file_cut_in_its_header(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is no safetensors file or is cut off"):
        read(file.parent)


def test_file_cut_in_its_data_names_the_tensor(file):
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off: tensor b lacks 4 bytes"):
        read(file.parent)


def test_other_content_is_no_safetensors_file(file):
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="no safetensors file"):
        read(file.parent)


def test_damaged_headers(file):
    file.write_bytes(struct.pack("<Q", 9) + b"{'a': 1} " + b"0" * 50)
    with pytest.raises(UserError, match="damaged header"):
        read(file.parent)
    head = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + b"0" * 8)
    with pytest.raises(UserError, match="tensor a has a damaged header entry"):
        read(file.parent)


SOUND = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "head",
    [
        [1],
        {"a": 5},
        {"a": {}},
        {"a": {**SOUND, "data_offsets": [-4, 0]}},
        {"a": {**SOUND, "data_offsets": [4, 0], "dtype": "F4"}},
        {"a": {**SOUND, "shape": [-1, -1]}},
        {"a": {**SOUND, "shape": "x"}},
        {"a": SOUND, "__metadata__": {"DCP_SHARDING_INFO": "{"}},
        {"a": SOUND, "__metadata__": {"DCP_SHARDING_INFO": "[]"}},
    ],
)
def test_headers_of_another_form_name_the_file(file, head):
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"0" * 4)
    with pytest.raises(UserError, match=rf"{file.name}.* damaged header"):
        read(file.parent)


def test_index_is_believed(file):
    directory = file.parent
    save_file({"a": TENSORS["a"]}, directory / "model-1.safetensors")
    save_file({"b": TENSORS["b"]}, directory / "model-2.safetensors")
    save_file({"stray": TENSORS["b"]}, directory / "model-3.safetensors")
    index = directory / "model.safetensors.index.json"
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(read(directory), TENSORS)
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing: it holds b"):
        read(directory)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is damaged \(no weight_map\)"):
        read(directory)


def test_second_copy_under_another_name_is_passed_over(file):
    save_file({"stray": TENSORS["b"]}, file.with_name("consolidated.safetensors"))
    assert_equal(read(file.parent), TENSORS)


def test_directory_without_weights(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        weight_files(tmp_path)


def save_pieces(directory: Path, pieces: list[dict[str, tuple[list[int], torch.Tensor]]]) -> None:
    """Files as torch.distributed.checkpoint writes them, one for each rank."""
    for rank, held in enumerate(pieces, start=1):
        offsets = {name: {"saved_offsets": offset} for name, (offset, _) in held.items()}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        tensors = {key: value.contiguous() for key, (_, value) in held.items()}
        save_file(tensors, directory / name, metadata)


def test_pieces_of_several_ranks_are_joined(tmp_path):
    a, b = TENSORS["a"], TENSORS["b"]
    first = {"a": ([0, 0], a[:, :2]), "b": ([0, 0], b[:3])}
    second = {"b": ([3, 0], b[3:]), "a": ([0, 2], a[:, 2:])}
    save_pieces(tmp_path, [first, second])
    assert_equal(read(tmp_path), TENSORS)
    save_pieces(tmp_path, [second, first])
    assert_equal(read(tmp_path), TENSORS)


def test_missing_piece_is_named(tmp_path):
    pieces = [{"b": ([row, 0], TENSORS["b"][row : row + 1])} for row in range(4)]
    save_pieces(tmp_path, pieces)
    assert_equal(read(tmp_path), {"b": TENSORS["b"]})
    next(tmp_path.glob("shard-00002-*")).unlink()
    with pytest.raises(UserError, match=r"pieces of b are missing"):
        read(tmp_path)


def test_pickled_tensors_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert_equal(read(tmp_path), TENSORS)


class Trap:
    """Runs code when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save(TENSORS | {"trap": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds more than tensors.*setattr"):
        read(tmp_path)
    assert not Trap.sprung


@pytest.mark.parametrize("kept", [0, 10, 300, 900])
def test_pickle_that_is_cut_off(tmp_path, kept):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read"):
        read(tmp_path)


def test_pickles_of_other_shapes(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert_equal(read(tmp_path), TENSORS)
    torch.save([TENSORS["a"]], path)
    with pytest.raises(UserError, match="holds a list, no table of tensors"):
        read(tmp_path)

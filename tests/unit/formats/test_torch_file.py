"""Files of tensors, written one at a time, as `torch.load` and unzip programs read them."""

from __future__ import annotations

import zipfile

import pytest
import torch

from gristmill.formats.torch_file import STORAGES, write_torch_file

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "naïve": torch.randn(300),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "turned": torch.randn(4, 6).t(),
    "part": torch.randn(6, 2)[2:5],
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", STORAGES, ids=str)
def test_torch_reads_what_was_written(tmp_path, dtype, mmap):
    path = tmp_path / "x.pth"
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()} | {"again": (5, 3)}
    dtypes = dict.fromkeys(shapes, dtype) | {"scalar": torch.float32}
    write_torch_file(path, shapes, dtypes, TENSORS.__getitem__, same={"again": "a.weight"})
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert list(found) == list(shapes)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == dtypes[name]
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor.to(dtypes[name]))
    assert found["again"].data_ptr() == found["a.weight"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # the checksums are right
        assert len([name for name in archive.namelist() if "/data/" in name]) == len(TENSORS)


def test_a_tensor_of_another_shape_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(AssertionError, match=r"a is \(2,\), not \(3,\)"):
        write_torch_file(
            tmp_path / "x.pth", {"a": (3,)}, {"a": torch.float32}, {"a": torch.ones(2)}.__getitem__
        )

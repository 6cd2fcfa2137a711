"""Writing a file of tensors that `torch.load` reads, without holding them all.

`torch.save` wants every tensor at once. Its file is a zip archive with a pickle that describes the
tensors and one record for the bytes of each: the pickle is made from names and shapes, and the
records follow one by one (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}


def write_torch_file(
    path: Path,
    shapes: Shapes,
    dtypes: Mapping[str, torch.dtype],
    get: Callable[[str], Tensor],
    *,
    same: Mapping[str, str] | None = None,
) -> None:
    """Write a table of tensors and fsync it, holding one tensor at a time.

    dtypes: name -> the dtype to store. `get(name)` gives the tensor of that name, of any dtype on
    any device. same: names of tensors that are another one, which is stored once.
    """
    same = same or {}
    keys = {name: str(number) for number, name in enumerate(n for n in shapes if n not in same)}
    records = {name: keys[same.get(name, name)] for name in shapes}
    writer = torch._C.PyTorchFileWriter(str(path))
    pickle = _pickle(shapes, records, dtypes)
    writer.write_record("data.pkl", pickle, len(pickle))
    order = sys.byteorder.encode()
    writer.write_record("byteorder", order, len(order))
    for name, key in keys.items():
        tensor = get(name).detach().to("cpu", dtypes[name]).contiguous()
        shape = tuple(tensor.shape)
        assert shape == tuple(shapes[name]), f"{name} is {shape}, not {shapes[name]}"
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a part of something larger
        record: Any = tensor.untyped_storage()  # torch's own stub leaves this kind out
        writer.write_record(f"data/{key}", record, tensor.nbytes)
    writer.write_end_of_file()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pickle(shapes: Shapes, records: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> bytes:
    """The pickle (protocol 2) of a dictionary of contiguous tensors with storages of their own."""
    out = [b"\x80\x02}("]
    for name, shape in shapes.items():
        numel, strides = 1, []
        for size in reversed(shape):
            strides.append(numel)
            numel *= size
        storage = b"".join(
            (_text("storage"), _global("torch", STORAGES[dtypes[name]]), _text(records[name]))
        )
        out += [
            _text(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            b"((" + storage + _text("cpu") + _number(numel) + b"tQ",
            _number(0) + _tuple(shape) + _tuple(tuple(reversed(strides))) + b"\x89",
            _global("collections", "OrderedDict") + b")RtR",
        ]
    return b"".join((*out, b"u."))


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"

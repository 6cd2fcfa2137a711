"""Tensors from and to files, one at a time: safetensors (whole or sharded by torch), `.bin`.

A tensor is read into memory of its own, not mapped: pages of a mapped file stay for as long as it
is open, and a model of many files would be in memory as a whole.

Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, raw data).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.formats.pickles import open_file
from gristmill.formats.source import AGAIN, Entry, Tensors
from gristmill.util.errors import UserError
from gristmill.util.paths import how_to_get

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
Json = dict[str, Any]


def read_header(path: Path) -> Json:
    """Tensor name -> {dtype, shape, data_offsets} (and `__metadata__`) of a safetensors file.

    Raises UserError naming the file, and the first tensor that lies outside it, when the file is
    no safetensors file or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path} is no safetensors file or is cut off ({size} bytes). {AGAIN}")
        try:
            header: Json = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} has a damaged header ({error}). {AGAIN}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} has a damaged header (it is no table of tensors). {AGAIN}")
    for name, entry in header.items():
        if name != "__metadata__":
            _check_entry(path, name, entry, size - 8 - length)
    return header


def _check_entry(path: Path, name: str, entry: Json, data_bytes: int) -> None:
    """UserError when a tensor's place in the file is not what its shape takes."""
    try:
        (start, end), dtype = map(int, entry["data_offsets"]), DTYPES.get(entry["dtype"])
        shape = [int(size) for size in entry["shape"]]
    except (KeyError, TypeError, ValueError):
        start, end, dtype, shape = -1, 0, None, []
    fits = dtype is None or end - start == dtype.itemsize * prod(shape)
    if not 0 <= start <= end or min(shape, default=0) < 0 or not fits:
        raise UserError(f"{path}: tensor {name} has a damaged header entry. {AGAIN}")
    if end > data_bytes:
        missing = end - data_bytes
        raise UserError(f"{path} is cut off: tensor {name} lacks {missing} bytes. {AGAIN}")


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a model directory, sorted; all of them exist.

    An index is believed over the listing, safetensors over `.bin`. Raises UserError when there is
    none, or a file of the index is missing.
    """
    for name in INDEX_FILES:
        index = directory / name
        if index.is_file():
            return _indexed_files(index)
    # Some repositories carry a second copy under another name (consolidated.safetensors).
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        files = sorted(directory.glob(pattern))
        if files:
            return files
    raise UserError(
        f"{directory} has no weights (*.safetensors or pytorch_model*.bin). {how_to_get(directory)}"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged (no weight_map). {AGAIN}") from None
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (index.parent / name).is_file():
            tensor = next(t for t, file in weight_map.items() if file == name)
            raise UserError(f"{index.parent / name} is missing: it holds {tensor}. {AGAIN}")
    return [index.parent / name for name in names]


def open_tensors(files: list[Path]) -> Tensors:
    """The tensors of safetensors and `.bin` files; pieces of a tensor come joined.

    Files written by `torch.distributed.checkpoint` on several ranks hold pieces of a tensor. Raises
    UserError naming the file (and tensor) that is cut off, damaged, or could run code.
    """
    headers = {file: read_header(file) for file in files if file.suffix == ".safetensors"}
    entries: dict[str, Entry] = {}
    for name, places in _pieces(headers).items():
        file = places[0][0]
        if len(places) == 1:
            entries[name] = Entry(file, partial(_read, file, name, headers[file][name]))
        else:
            entries[name] = Entry(file, partial(_join, name, places, headers))
    for file in files:
        if file.suffix != ".safetensors":
            entries |= open_file(file)
    return Tensors(entries)


def _read(path: Path, name: str, entry: Json) -> Tensor:
    """One tensor of a safetensors file, in memory of its own."""
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UserError(
            f"{path}: tensor {name} has the type {entry['dtype']}. Supported: {', '.join(DTYPES)}."
        )
    start, end = entry["data_offsets"]
    data = torch.empty(end - start, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        head = struct.unpack("<Q", file.read(8))[0]
        file.seek(8 + head + start)
        view, done = data.numpy().data, 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise UserError(f"{path} is cut off: tensor {name} ends too early. {AGAIN}")
            done += count
    return data.view(dtype).view(entry["shape"])


Place = tuple[Path, tuple[int, ...]]


def _pieces(headers: dict[Path, Json]) -> dict[str, list[Place]]:
    """Tensor name -> the files that hold a piece of it, with the piece's offsets."""
    places: dict[str, list[Place]] = {}
    for file, header in headers.items():
        saved = _saved_offsets(file, header)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            offsets = saved.get(name, [0] * len(entry["shape"]))
            if (file, tuple(offsets)) not in places.setdefault(name, []):
                places[name].append((file, tuple(offsets)))
    return places


def _saved_offsets(file: Path, header: Json) -> dict[str, list[int]]:
    """Where the pieces in a file written by torch begin in their tensors."""
    try:
        sharding = json.loads(header.get("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
        return {name: list(info["saved_offsets"]) for name, info in sharding.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file} has a damaged header (DCP_SHARDING_INFO). {AGAIN}") from None


def _join(name: str, places: list[Place], headers: dict[Path, Json]) -> Tensor:
    """The whole tensor from its pieces, which must cover it."""
    entries = [(file, offsets, headers[file][name]["shape"]) for file, offsets in places]
    full = [max(o[d] + s[d] for _, o, s in entries) for d in range(len(entries[0][2]))]
    distinct = {offsets: shape for _, offsets, shape in entries}
    if sum(prod(shape) for shape in distinct.values()) != prod(full):
        files = ", ".join(file.name for file, _ in places)
        raise UserError(f"{places[0][0].parent}: pieces of {name} are missing (have {files}).")
    whole: Tensor | None = None
    for file, offsets, shape in entries:
        piece = _read(file, name, headers[file][name])
        whole = piece.new_empty(full) if whole is None else whole
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, shape))] = piece
    assert whole is not None
    return whole


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    wide: Collection[str] = (),
) -> None:
    """Write a safetensors file of one dtype and fsync it, holding one tensor at a time.

    `get(name)` gives the tensor of that name, of any dtype on any device. Those in `wide` are
    written in fp32.
    """
    dtypes = {name: torch.float32 if name in wide else dtype for name in shapes}
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtypes[name].itemsize * prod(shape)
        header[name] = {
            "dtype": DTYPE_NAMES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data starts at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in shapes.items():
            tensor = get(name).detach().to("cpu", dtypes[name]).contiguous()
            assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

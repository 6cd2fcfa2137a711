"""Tensors out of other tools' pickles, without running what is in them.

A pickle is a program. torch's own reader is asked for tensors only (`weights_only`). The
`.metadata` of sharded checkpoints is a plain pickle of torch.distributed.checkpoint: every class it
names is replaced by a stand-in that keeps what was written and does nothing, and a name that is not
on the list ends the reading.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from pickle import Unpickler
from typing import Any

import torch
from torch import Tensor

from gristmill.formats.source import AGAIN, Entry
from gristmill.util.errors import UserError

METADATA = ".metadata"
REMAP_BYTES = 2**29


@dataclass(frozen=True)
class PeekEntry(Entry):
    """A tensor of a file, of which a first part can be had at little cost."""

    peek: Callable[[], Tensor]


def open_file(path: Path, inside: tuple[str, ...] = ()) -> dict[str, PeekEntry]:
    """The tensors in a table that `torch.save` wrote, by name; other values are passed over.

    inside: keys under which the table may lie in a larger one, as in training checkpoints. Tensors
    are read anew when asked for, into memory of their own. Raises UserError naming the file when it
    is damaged, holds no table, or names anything that could run code.
    """
    mapped = _Mapped(path, inside)
    return {
        name: PeekEntry(path, partial(mapped.read, name), partial(mapped.peek, name))
        for name, value in mapped.table.items()
        if isinstance(value, Tensor)
    }


class _Mapped:
    """A file that is mapped, and mapped anew from time to time.

    Pages of a mapped file stay in memory for as long as it is mapped.
    """

    def __init__(self, path: Path, inside: tuple[str, ...]) -> None:
        self.path, self.inside = path, inside
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        self.mappable = zipfile.is_zipfile(path)
        self._map()

    def _map(self) -> None:
        self.table = self._table(_load(self.path, self.path, mmap=self.mappable))
        self._read_bytes = 0

    def _table(self, content: Any) -> dict[str, Any]:
        for key in self.inside:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise UserError(f"{self.path} holds a {kind}, no table of tensors. {AGAIN}")
        return content

    def read(self, name: str) -> Tensor:
        if self.mappable and self._read_bytes > REMAP_BYTES:
            self.table = {}
            self._map()
        tensor: Tensor = self.table[name].detach()
        self._read_bytes += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)

    def peek(self, name: str) -> Tensor:
        tensor: Tensor = self.table[name].detach()
        return tensor[:1].clone() if tensor.dim() else tensor.clone()


def _load(source: Path | io.BytesIO, path: Path, *, mmap: bool) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise _refusal(path, error) from None


def _refusal(path: Path, error: Exception) -> UserError:
    """The error for a pickle that could not be read, or names something that could run code."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return UserError(
            f"{path} holds more than tensors, which could run code ({code.group(1)}). "
            "Nothing of it was run. Use a safetensors version of this model, or save its tensors "
            "alone where it was made: torch.save(model.state_dict(), ...)."
        )
    reason = re.split(r"[.\n]", str(error), maxsplit=1)[0] or type(error).__name__
    return UserError(f"{path} cannot be read ({reason}). {AGAIN}")


class _Record:
    """Stands in for a class that a pickle names: keeps arguments and state, and does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        """A field of a dataclass."""
        return self.state[name]


class _Tensor(_Record):
    """TensorStorageMetadata: properties, size, chunks."""


class _Index(_Record):
    """MetadataIndex: fqn, offset, index."""


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_CHECKPOINT = "torch.distributed.checkpoint"
_SHARD = "torch.distributed._shard.sharded_tensor.metadata"
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Record,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _Record,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): _Record,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): _Record,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Index,
    (f"{_CHECKPOINT}.metadata", "StorageMeta"): _Record,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Record,
    (_SHARD, "TensorProperties"): _Record,
    (_SHARD, "MEM_FORMAT_ENCODING"): _Record,
    ("torch", "Size"): _size,
    ("torch", "device"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "WindowsPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
    ("pathlib._local", "WindowsPath"): _Record,
    ("collections", "OrderedDict"): dict,
}


class _MetadataReader(Unpickler):
    """Reads `.metadata`; every name becomes a stand-in of this file, or an error."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        try:
            return _STAND_INS[module_name, global_name]
        except KeyError:
            raise ValueError(f"GLOBAL {module_name}.{global_name}") from None


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, and the bytes of a file that hold it (as `torch.save` wrote it)."""

    offsets: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    size: tuple[int, ...]
    pieces: tuple[_Piece, ...]


def open_sharded(directory: Path) -> dict[str, PeekEntry]:
    """The tensors of a directory of torch.distributed.checkpoint, whole, read when asked for.

    Names are as saved: a path joined by dots, such as `model.lm_head.weight`. Raises UserError
    naming directory or file and tensor when something is damaged, missing or could run code.
    """
    metadata = directory / METADATA
    try:
        # Never the pickle module's own reader, which calls whatever the file names.
        entries = _entries(_MetadataReader(io.BytesIO(metadata.read_bytes())).load())
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {METADATA}, which says where its tensors are. {AGAIN}"
        ) from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise _refusal(metadata, error) from None
    out = {}
    for name, entry in entries.items():
        first = entry.pieces[0]
        out[name] = PeekEntry(
            directory / first.file,
            partial(_whole, directory, name, entry),
            partial(_read_piece, directory, name, first),
        )
    return out


def _whole(directory: Path, name: str, entry: _Entry) -> Tensor:
    """The tensor from its pieces, which must cover it."""
    whole = torch.empty(entry.size, dtype=entry.dtype)
    covered = 0
    for piece in entry.pieces:
        part = _read_piece(directory, name, piece)
        covered += part.numel()
        if not entry.size:
            return part
        place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, part.shape, strict=True))
        if whole[place].shape != part.shape:
            raise UserError(f"{directory / piece.file}: tensor {name} does not fit. {AGAIN}")
        whole[place] = part
    if covered != prod(entry.size):
        files = ", ".join(piece.file for piece in entry.pieces)
        raise UserError(f"{directory}: pieces of tensor {name} are missing ({files}). {AGAIN}")
    return whole


def _read_piece(directory: Path, name: str, piece: _Piece) -> Tensor:
    """The piece of a tensor at its place in a file."""
    path = directory / piece.file
    try:
        with path.open("rb") as file:
            file.seek(piece.start)
            data = file.read(piece.length)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; it holds tensor {name}. {AGAIN}") from None
    if len(data) < piece.length:
        lacking = piece.length - len(data)
        raise UserError(f"{path} is cut off: tensor {name} lacks {lacking} bytes. {AGAIN}")
    part = _load(io.BytesIO(data), path, mmap=False)
    if not isinstance(part, Tensor):
        raise UserError(f"{path} holds no tensor where {name} should be. {AGAIN}")
    return part.detach()


def _entries(metadata: _Record) -> dict[str, _Entry]:
    """Name -> dtype, size and pieces of every tensor that has any."""
    pieces: dict[str, list[_Piece]] = {}
    for index, info in metadata["storage_data"].items():
        # The file's name alone: a path that leads elsewhere is no shard of this checkpoint.
        file = Path(info["relative_path"]).name
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{index['fqn']} is stored through {info['transform_descriptors']}")
        where = _Piece(_size(index.state.get("offset") or ()), file, info["offset"], info["length"])
        pieces.setdefault(index["fqn"], []).append(where)
    out = {}
    for name, entry in metadata["state_dict_metadata"].items():
        if isinstance(entry, _Tensor) and name in pieces:
            dtype = _dtype(entry["properties"])
            out[name] = _Entry(dtype, entry["size"], tuple(pieces[name]))
    return out


def _dtype(properties: _Record) -> torch.dtype:
    """The dtype among the properties of a tensor, kept as a tuple or as fields."""
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}")
    return dtype

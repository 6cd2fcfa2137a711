"""What stands at the head of a GGUF file: metadata, and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only the standard library is
needed for it, so that a configuration or a tokenizer comes out of a file of any quantisation.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gristmill.util.errors import UserError

SUFFIX = ".gguf"
AGAIN = "Download or copy it again."
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Numbers of the format's types -> letters of `struct`.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: its shape as torch has it, number of its type, first byte."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The head of a GGUF file. `digest`: sha256 of it, in hex."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    num_bytes: int
    digest: str


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or the only one in the directory; None for others.

    Raises UserError for a directory with several, and for one part of a model in several files.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:4])
            raise UserError(f"{path} has {len(files)} GGUF files ({names}). Name one of them.")
        path = files[0] if files else path
    return path if path.suffix.lower() == SUFFIX and path.is_file() else None


def read_header(path: Path) -> Header:
    """The head of the GGUF file at `path`. Raises UserError when it is cut off or none."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). {AGAIN}") from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int, num_bytes: int) -> Header:
    """One command asks several times: for the configuration, the tokenizer and the weights."""
    if num_bytes < 24:
        raise UserError(f"{path} is no GGUF file ({num_bytes} bytes). {AGAIN}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
        raise UserError(f"{path} is cut off or damaged in its head ({error}). {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). {AGAIN}") from None


class _Reader:
    """Reads the head from front to back."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._data[:4] != _MAGIC:
            raise UserError(f"{self._path} is no GGUF file. Name a file that llama.cpp can read.")
        version = struct.unpack_from("<I", self._data, 4)[0]
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            raise UserError(
                f"{self._path} has GGUF version {version} (or is big-endian). Read are versions "
                f"{known}, little-endian: convert the model again with llama.cpp's converter."
            )
        self._at = 8
        num_tensors, num_entries = self._take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            metadata[key] = self._value(self._take("I")[0])
        if metadata.get("split.count", 1) > 1:
            raise UserError(
                f"{self._path} is one of {metadata['split.count']} files of a model. Join them: "
                "llama-gguf-split --merge FIRST_FILE MODEL.gguf"
            )
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        return Header(
            path=self._path,
            metadata=metadata,
            tensors={t.name: TensorInfo(t.name, t.shape, t.type, start + t.offset) for t in found},
            num_bytes=len(self._data),
            digest=hashlib.sha256(self._data[: self._at]).hexdigest(),
        )

    def _take(self, letters: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + letters, self._data, self._at)
        self._at += struct.calcsize("<" + letters)
        return values

    def _bytes(self) -> bytes:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        start, end = self._at + 8, self._at + 8 + length
        if end > len(self._data):
            raise IndexError("a string reaches over its end")
        self._at = end
        return self._data[start:end]

    def _string(self) -> str:
        return self._bytes().decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, count = self._take("IQ")
            if of in _SCALARS:
                if count > len(self._data):
                    raise IndexError("a list reaches over its end")
                return list(self._take(f"{count}{_SCALARS[of]}"))
            read: Callable[[], Any] = self._string if of == _STRING else lambda: self._value(of)
            return [read() for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError(f"a value has the unknown type {kind}")
        (value,) = self._take(_SCALARS[kind])
        return shortest(value) if _SCALARS[kind] == "f" else value

    def _tensor(self) -> TensorInfo:
        name = self._string()
        (num_dims,) = self._take("I")
        if num_dims > _MAX_DIMENSIONS:
            raise IndexError(f"tensor {name} has {num_dims} dimensions")
        *dims, kind, offset = self._take(f"{num_dims}QIQ")
        return TensorInfo(name, tuple(reversed(dims)), kind, offset)


def shortest(value: float) -> float:
    """The shortest decimal number that is this one in 32 bits: 1e-05, not 9.999999747378752e-06."""
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == value:
            return short
    return value

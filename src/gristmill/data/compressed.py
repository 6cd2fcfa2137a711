"""Compressed files as streams of bytes; the one place that knows gzip and Zstandard."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

_READ_BYTES = 1 << 18
_SUFFIXES = {".gz", ".zst"}


class Damaged(Exception):
    """The file does not decompress."""


def is_compressed(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.suffix.lower() in _SUFFIXES


def reader(path: Path, raw: io.RawIOBase) -> BinaryIO:
    """The text of `raw`, a file called `path`, as a buffered stream.

    Reading raises Damaged, EOFError or zlib.error where the file is broken or cut short.
    """
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=io.BufferedReader(raw, _READ_BYTES)))
    return cast(BinaryIO, io.BufferedReader(_Zstandard(raw), 1 << 20))


def text_size(path: Path) -> int:
    """Bytes of text in the file, found by decompressing it."""
    size = 0
    with path.open("rb", buffering=0) as raw, reader(path, raw) as stream:
        while data := stream.read(1 << 20):
            size += len(data)
    return size


class _Zstandard(io.RawIOBase):
    """Zstandard frames as bytes. Unlike in the package's own, an incomplete frame is an error."""

    def __init__(self, raw: io.RawIOBase) -> None:
        import zstandard

        self._raw, self._module = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        while not self._left:
            data = self._raw.read(_READ_BYTES)
            if not data:
                if self._begun:
                    raise Damaged("the file ends inside a compressed frame")
                return 0
            self._left = memoryview(b"".join(self._decompressed(data)))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _decompressed(self, data: bytes) -> list[bytes]:
        parts = []
        while data:
            self._begun = True
            try:
                parts.append(self._frame.decompress(data))
            except self._module.ZstdError as error:
                raise Damaged(str(error)) from error
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._module.ZstdDecompressor().decompressobj()
                self._begun = False
        return parts

"""Compressed files as streams of bytes in bounded memory; the place that knows gzip and Zstandard.

A file may hold several frames (zstd) or members (gzip). Unlike in the libraries' own readers, a
file that ends inside one is an error.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path, PurePath
from typing import Any, Protocol

_READ_BYTES = 1 << 18
_SUFFIXES = {".gz", ".zst"}


class Damaged(Exception):
    """The file does not decompress."""


class Stream(Protocol):
    """Bytes in order."""

    def read(self, size: int, /) -> bytes:
        """The next 1 to `size` bytes, none at the end."""


def is_compressed(place: str | Path) -> bool:
    """Whether the name says that the file is compressed."""
    return PurePath(place).suffix.lower() in _SUFFIXES


def reader(place: str | Path, raw: Stream) -> Stream:
    """The text of `raw`, a file called `place`.

    Reading raises Damaged, EOFError or zlib.error where the file is broken or cut short.
    """
    suffix = PurePath(place).suffix.lower()
    if suffix == ".gz":
        return _Gzip(raw)
    if suffix == ".zst":
        return _Zstandard(raw)
    return raw


class _Gzip:
    """Gzip members, one after another; their checksums are compared by zlib."""

    def __init__(self, raw: Stream) -> None:
        self._raw = raw
        self._member: Any = None
        self._left = b""

    def read(self, size: int, /) -> bytes:
        while True:
            if not self._left:
                self._left = self._raw.read(_READ_BYTES)
                if not self._left:
                    if self._member is not None:
                        raise Damaged("the file ends inside compressed data")
                    return b""
            if self._member is None:
                # Some writers fill up the last block of the disk.
                self._left = self._left.lstrip(b"\0")
                if not self._left:
                    continue
                self._member = zlib.decompressobj(wbits=31)
            data: bytes = self._member.decompress(self._left, size)
            self._left = self._member.unconsumed_tail
            if self._member.eof:
                self._left = self._member.unused_data
                self._member = None
            if data:
                return data


class _Zstandard:
    """Zstandard frames, one after another."""

    def __init__(self, raw: Stream) -> None:
        import zstandard

        self._error: type[Exception] = zstandard.ZstdError
        self._frames = _Frames(raw)
        # Windows of up to 2 GiB, which `zstd --ultra --long=31` writes.
        self._reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(
            self._frames,  # type: ignore[arg-type]
            read_size=_READ_BYTES,
            read_across_frames=True,
        )

    def read(self, size: int, /) -> bytes:
        try:
            data = self._reader.read(size)
        except self._error as error:
            raise Damaged(str(error)) from error
        if not data and not self._frames.is_complete:
            raise Damaged("the file ends inside a compressed frame")
        return data


class _Frames:
    """What a decompressor reads from, and whether that ends between two frames.

    The library's reader takes the end of the file for the end of the text wherever it comes. Its
    other interface notices, but gives all text of a call at once, of any size. So the headers of
    frames and blocks are followed here (RFC 8878, section 3.1): one for about 128 kB of text.
    """

    def __init__(self, raw: Stream) -> None:
        self._raw = raw
        self._skip = 0
        self._head = b""
        self._want, self._next = 4, self._magic
        self._checksum = 0

    @property
    def is_complete(self) -> bool:
        """Whether no frame is open."""
        return not self._skip and not self._head and self._next == self._magic

    def read(self, size: int, /) -> bytes:
        """The next bytes of the file, as they are."""
        data = self._raw.read(size)
        at, end = 0, len(data)
        while at < end:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
                continue
            taken = data[at : at + self._want - len(self._head)]
            self._head += taken
            at += len(taken)
            if len(self._head) == self._want:
                head, self._head = self._head, b""
                self._next(head)
        return data

    def _expect(self, want: int, then: Any) -> None:
        self._want, self._next = want, then

    def _magic(self, head: bytes) -> None:
        (number,) = struct.unpack("<I", head)
        if number == 0xFD2FB528:
            self._expect(1, self._descriptor)
        elif number & 0xFFFFFFF0 == 0x184D2A50:
            self._expect(4, self._skippable)
        else:
            raise Damaged("there is something else than compressed frames")

    def _skippable(self, head: bytes) -> None:
        (self._skip,) = struct.unpack("<I", head)
        self._expect(4, self._magic)

    def _descriptor(self, head: bytes) -> None:
        flags = head[0]
        single = flags >> 5 & 1
        self._checksum = 4 * (flags >> 2 & 1)
        self._skip = (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6] + 1 - single
        self._expect(3, self._block)

    def _block(self, head: bytes) -> None:
        number = int.from_bytes(head, "little")
        is_last, kind, size = number & 1, number >> 1 & 3, number >> 3
        self._skip = 1 if kind == 1 else size
        if is_last:
            self._skip += self._checksum
            self._expect(4, self._magic)

"""One JSON record of any length, in bounded memory.

The record is written to a temporary file as it comes; its outline, where long strings are only
names, is kept and parsed. The text is then read from the file in pieces.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import orjson

from gristmill.data.raw import documents
from gristmill.data.raw.documents import FILTERED, Document, Reject, Unreadable
from gristmill.util.errors import RunError

if TYPE_CHECKING:
    from gristmill.data.raw.readers.reading import Reading

_STRING_BYTES = 1 << 16
_OUTLINE_BYTES = 64 << 20
_PIECE_BYTES = 2 << 20
_STRUCTURE = re.compile(rb'["\[\]{}]')
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


class Outline:
    """A record that begins at byte `at`, given piece by piece."""

    def __init__(self, reading: Reading, at: int) -> None:
        self._reading, self._at = reading, at
        self._file: IO[bytes] = _temporary()
        self._kept = bytearray()
        self._strings: list[tuple[int, int]] = []
        self._name = uuid.uuid4().hex
        self._size = 0
        self._depth = 0
        # Of the string that is open: where its text begins, what came of it while it is short.
        self._opened = -1
        self._pending = bytearray()
        self._odd = False  # ends in an odd number of backslashes

    def __enter__(self) -> Outline:
        """Itself; the temporary file goes at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the temporary file back."""
        self._file.close()

    def add(self, data: bytes, *, one_value: bool = False) -> int:
        """Take the next bytes; how many of them belong to the record.

        With `one_value` the record ends where its brackets close: -1 while they are open.
        """
        at = 0
        while at < len(data):
            if self._opened >= 0:
                at = self._in_string(data, at)
                if one_value and not self._depth and self._opened < 0:
                    self._write(data[:at])
                    return at
                continue
            found = _STRUCTURE.search(data, at)
            end = found.end() if found else len(data)
            self._keep(data[at:end])
            at = end
            if found is None:
                break
            mark = found.group()
            if mark == b'"':
                self._opened = self._size + end
            else:
                self._depth += 1 if mark in b"[{" else -1
                if one_value and self._depth <= 0:
                    self._write(data[:end])
                    return end
        self._write(data)
        return -1 if one_value else len(data)

    def document(self) -> Iterator[Document]:
        """The document of the whole record; none for white space."""
        if len(self._kept) > _OUTLINE_BYTES:
            detail = f"{self._size:,} bytes without a long text"
            yield self._reading.reject(self._at, "record too large", detail)
            return
        try:
            text = self._text()
        except Unreadable as error:
            yield error.reject
            return
        if isinstance(text, LongJson):
            yield text
            # What was not taken must not be taken any more: the file goes.
            text.close()
        elif text is not None:
            yield text

    def _text(self) -> Document | LongJson | None:
        kept = bytes(self._kept) + bytes(self._pending)
        self._kept.clear()
        if not kept.strip():
            return None
        try:
            record = self._reading.parse(self._at, kept)
        except ValueError as error:
            return self._reading.unparsed(self._at, kept, error)
        found = self._reading.records.text(record, self._at)
        if found is None:
            return FILTERED
        if isinstance(found, Reject) or not found.startswith(self._name):
            return found
        start, stop = self._strings[int(found[len(self._name) :])]
        text = LongJson(self._reading, self._at, self._file, start, stop)
        if stop - start > documents.LONG_BYTES:
            return text
        return "".join(text.pieces())

    def _in_string(self, data: bytes, at: int) -> int:
        """Go on in the open string; where it ends in `data`, behind its mark, or all of it."""
        start = at
        while (quote := data.find(b'"', at)) >= 0:
            inside = data[start:quote]
            backslashes = len(inside) - len(inside.rstrip(b"\\"))
            odd = bool(backslashes % 2) != (self._odd and backslashes == len(inside))
            if not odd:
                self._append(inside)
                self._close_string(self._size + quote)
                return quote + 1
            self._append(inside + b'"')
            self._odd = False
            start = at = quote + 1
        rest = data[start:]
        if rest:
            backslashes = len(rest) - len(rest.rstrip(b"\\"))
            self._odd = bool(backslashes % 2) != (self._odd and backslashes == len(rest))
            self._append(rest)
        return len(data)

    def _append(self, data: bytes) -> None:
        """Text of the open string, kept while it is short."""
        if len(self._pending) <= _STRING_BYTES:
            self._pending += data

    def _close_string(self, stop: int) -> None:
        if len(self._pending) <= _STRING_BYTES:
            self._keep(bytes(self._pending))
        else:
            self._keep(f"{self._name}{len(self._strings)}".encode())
            self._strings.append((self._opened, stop))
        self._keep(b'"')
        self._pending.clear()
        self._opened, self._odd = -1, False

    def _keep(self, data: bytes) -> None:
        if len(self._kept) <= _OUTLINE_BYTES:
            self._kept += data

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _no_room(error) from error
        self._size += len(data)


@dataclass
class LongJson:
    """The text of a long string: bytes `start` to `stop` of a file, as JSON writes them."""

    _reading: Reading
    _at: int
    _file: IO[bytes]
    _start: int
    _stop: int

    def pieces(self) -> Iterator[str]:
        """The text in order, a few MB at a time. Raises `Unreadable`, and DataError."""
        left = b""
        at = self._start
        while at < self._stop:
            assert not self._file.closed, "a long text must be read before the next document"
            self._file.seek(at)
            data = self._file.read(min(_PIECE_BYTES, self._stop - at))
            at += len(data)
            data = left + data
            end = cut_point(data) if at < self._stop else len(data)
            left = data[end:]
            try:
                piece = orjson.loads(b'"' + data[:end] + b'"')
            except ValueError as error:
                raise Unreadable(self._reading.unparsed(self._at, data[:end], error)) from error
            if piece:
                yield piece

    def close(self) -> None:
        """Nothing can be read any more."""
        self._file.close()


def cut_point(data: bytes) -> int:
    """Where a part of a JSON string can be cut so that both sides are text.

    That is not inside an escape or a character, nor between two escapes that make one character.
    """
    end = len(data)
    last = data.rfind(b"\\", max(0, end - 6))
    if last >= 0 and _begins_escape(data, last):
        is_whole = end - last >= (6 if data[last + 1 : last + 2] == b"u" else 2)
        end = end if is_whole else last
    back = end - 6
    if back >= 0 and _HIGH_SURROGATE.match(data, back) and _begins_escape(data, back):
        return back
    if end < len(data):
        return end
    # Not inside of a character in UTF-8, of up to four bytes.
    for count in range(1, min(4, end) + 1):
        byte = data[end - count]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return end if count >= length else end - count
    return end


def _begins_escape(data: bytes, at: int) -> bool:
    """Whether the backslash at `at` is not itself escaped; `data` begins between characters."""
    before = data[:at]
    return (at - len(before.rstrip(b"\\"))) % 2 == 0


def _temporary() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> RunError:
    return RunError(
        f"a long document cannot be kept in {tempfile.gettempdir()} ({error.strerror}). "
        "make room there, or name another folder: TMPDIR=FOLDER gristmill ..."
    )

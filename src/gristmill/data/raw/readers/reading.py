"""What every reader gets: where the bytes are, which of them, and what is wanted of them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, cast

import orjson

from gristmill.data.raw.documents import DataError, Format, Input, Reject, Span
from gristmill.data.raw.readers import compressed
from gristmill.data.raw.select import MISSING, Selection, look_up
from gristmill.data.storage import Storage

# A file of a store is fetched in blocks of this size, this many in advance.
_AHEAD_BYTES = 4 << 20
_AHEAD_BLOCKS = 3

BOM = b"\xef\xbb\xbf"


class Damaged(Exception):
    """What is in the file is not what its form asks for; the message says where."""


@dataclass(frozen=True)
class Reading:
    """A span of an input, how to read it, and which records are kept."""

    form: Format
    root: Storage
    item: Input
    span: Span
    selection: Selection | None = None

    def open(self) -> BinaryIO:
        """The file as it lies there; reading raises OSError only."""
        file = self.root.open(self.item.place)
        return file if self.root.is_local else cast(BinaryIO, _Remote(file))

    def open_native(self) -> Any:
        """The file for Arrow, which reads a disk without a detour through Python."""
        import pyarrow as pa

        if self.root.is_local:
            return pa.OSFile(self.root.at(self.item.place))
        return self.open()

    def stream(self, file: BinaryIO) -> compressed.Stream:
        """The text of the file from where it stands, decompressed.

        `read(n)` gives 1 to n bytes, none at the end.
        """
        if isinstance(file, _Remote) and self.item.size > _AHEAD_BYTES:
            return compressed.reader(self.item.place, file.ahead())
        return compressed.reader(self.item.place, file)

    def reject(self, at: int, reason: str, detail: str = "") -> Reject:
        """A document that begins at byte (or row) `at` and cannot be read."""
        return Reject(self.item.path, at, reason, detail)

    def parse(self, at: int, data: bytes) -> Any:
        """The JSON that begins at byte `at`. Raises ValueError."""
        try:
            return orjson.loads(data)
        except ValueError:
            if at == 0 and data.startswith(BOM):
                return orjson.loads(data[len(BOM) :])
            if b"NaN" not in data and b"Infinity" not in data:
                raise
        # That is no JSON, but Python writes it unasked.
        record = json.loads(data)
        # As strict about halves of characters as for other records.
        json.dumps(record, ensure_ascii=False).encode()
        return record

    def unparsed(self, at: int, data: bytes, error: ValueError) -> Reject:
        """A record that begins at byte `at` and is no JSON: what is wrong with it."""
        try:
            data.decode()
        except UnicodeDecodeError as wrong:
            return self.reject(at, "not UTF-8", wrong.reason)
        return self.reject(at, "bad JSON", str(error))

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Turn what reading a broken file raises into a DataError that names the file."""
        where = self.root.at(self.item.place)
        broken = (
            "fetch it again, or move it away, and run the same command again "
            "(--on_error quarantine leaves such files out)."
        )
        try:
            yield
        except (EOFError, zlib.error, compressed.Damaged, Damaged) as error:
            raise DataError(
                f"{where} is damaged or incomplete ({error}). {broken}", self.item.path, str(error)
            ) from error
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # Arrow's own
                raise DataError(
                    f"{where} is damaged or incomplete ({error}). {broken}",
                    self.item.path,
                    str(error),
                ) from error
            raise DataError(
                f"cannot read {where} ({error.strerror or error}). "
                "run the same command again when it can be read.",
                self.item.path,
                error.strerror or type(error).__name__,
            ) from error

    @cached_property
    def records(self) -> Records:
        """How a record becomes a document."""
        return Records(self)


class Records:
    """From a record to its document: filter, field, kind."""

    def __init__(self, reading: Reading) -> None:
        self._reading, self._selection = reading, reading.selection
        self._field = reading.form.text_field

    def text(self, record: Any, at: int) -> str | Reject | None:
        """The text of the record at `at`, why there is none, or None where it is left out."""
        reject = self._reading.reject
        if type(record) is not dict:
            return reject(at, "not an object", type(record).__name__)
        if self._selection is not None and not self._selection.keep(record):
            return None
        found = look_up(record, self._field)
        if type(found) is str:
            return found
        if found is MISSING:
            return self.no_field(at, list(record))
        return self.not_text(at, "null" if found is None else type(found).__name__)

    def no_field(self, at: int, fields: list[str]) -> Reject:
        """A record without the field."""
        detail = f"fields: {', '.join(map(str, fields[:20]))}"
        return self._reading.reject(at, f"no field {self._field!r}", detail)

    def not_text(self, at: int, kind: str) -> Reject:
        """A record whose field is something else than text."""
        return self._reading.reject(at, f"field {self._field!r} is not text", kind)


class _Remote(io.RawIOBase):
    """A file of an object store whose errors are all OSErrors, as those of a disk are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ahead: _Ahead | None = None

    def ahead(self) -> _Ahead:
        """What follows, fetched in advance; nothing else may read the file any more."""
        self._ahead = _Ahead(self)
        return self._ahead

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return cast(bytes, self._tried(self._file.read, size))

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return cast(int, self._tried(self._file.seek, offset, whence))

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if not self.closed:
            self._file.close()
        super().close()

    def _tried(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error
        except Exception as error:  # each client library has errors of its own
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class _Ahead:
    """A stream that is fetched by a thread while what came before is worked on."""

    def __init__(self, file: compressed.Stream) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._fetched: deque[Future[bytes]] = deque()
        self._data, self._at = b"", 0
        for _ in range(_AHEAD_BLOCKS):
            self._fetch()

    def read(self, size: int, /) -> bytes:
        """The next 1 to `size` bytes, none at the end."""
        if self._at == len(self._data):
            if not self._fetched:
                return b""
            self._data, self._at = self._fetched.popleft().result(), 0
            if self._data:
                self._fetch()
            else:
                self._fetched.clear()
        data = self._data[self._at : self._at + size]
        self._at += len(data)
        return data

    def close(self) -> None:
        """Wait until nobody reads the file."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self) -> None:
        self._fetched.append(self._thread.submit(self._file.read, _AHEAD_BYTES))

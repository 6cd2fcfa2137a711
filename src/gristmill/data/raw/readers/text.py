"""Text files: a file is a document, or several where a separator parts them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from gristmill.data.raw import documents
from gristmill.data.raw.documents import Document, Unreadable
from gristmill.data.raw.readers.compressed import Stream, is_compressed
from gristmill.data.raw.readers.reading import BOM, Reading

_BLOCK_BYTES = 1 << 20


def read(reading: Reading) -> Iterator[Document]:
    """The documents of the file, which is read whole; each is judged by itself."""
    item = reading.item
    with reading.open() as file:
        stream = reading.stream(file)
        limit = documents.LONG_BYTES
        # One byte more shows whether that is all.
        expected = limit if is_compressed(item.place) else min(item.size, limit)
        head = _read_up_to(stream, expected + 1)
        if expected < limit and len(head) > expected:
            head += _read_up_to(stream, limit - expected)
        start = len(BOM) if head.startswith(BOM) else 0
        separator = reading.form.separator
        if len(head) > limit:
            yield from _streamed(reading, _Parts(stream, head, start, separator))
        elif separator:
            yield from _parted(reading, head, start, separator.encode())
        else:
            yield _document(reading, start, head[start:] if start else head)


def _read_up_to(stream: Stream, size: int) -> bytes:
    """`size` bytes, fewer only at the end."""
    data = stream.read(size)
    if not data or len(data) == size:
        return data
    parts = [data]
    left = size - len(data)
    while left > 0 and (data := stream.read(min(left, _BLOCK_BYTES))):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def _parted(reading: Reading, data: bytes, at: int, separator: bytes) -> Iterator[Document]:
    for part in data[at:].split(separator):
        yield _document(reading, at, part)
        at += len(part) + len(separator)


def _document(reading: Reading, at: int, data: bytes) -> Document:
    if b"\0" in data:
        return reading.reject(at, "binary", "holds NUL bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return reading.reject(at + error.start, "not UTF-8", str(error.reason))


def _streamed(reading: Reading, parts: _Parts) -> Iterator[Document]:
    """The documents of a file that is too long to be held."""
    while not parts.is_at_end:
        whole = parts.whole(documents.LONG_BYTES)
        if whole is not None:
            at, data = whole
            yield _document(reading, at, data)
            continue
        text = LongPlain(reading, parts)
        yield text
        text.skip()


class LongPlain:
    """A document that is read from its file as it is asked for."""

    def __init__(self, reading: Reading, parts: _Parts) -> None:
        self._reading, self._at = reading, parts.at
        self._chunks = parts.chunks()

    def pieces(self) -> Iterator[str]:
        """The text in order, a few MB at a time. Raises `Unreadable`, and DataError."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        at = self._at
        with self._reading.faults():
            for data in self._chunks:
                yield self._decoded(decoder, data, at)
                at += len(data)
        if last := self._decoded(decoder, b"", at, final=True):
            yield last

    def skip(self) -> None:
        """Go behind the document, wherever reading it ended."""
        for _ in self._chunks:
            pass

    def _decoded(
        self, decoder: codecs.IncrementalDecoder, data: bytes, at: int, *, final: bool = False
    ) -> str:
        if b"\0" in data:
            raise Unreadable(self._reading.reject(self._at, "binary", "holds NUL bytes"))
        before = len(decoder.getstate()[0])
        try:
            return decoder.decode(data, final)
        except UnicodeDecodeError as error:
            place = at - before + error.start
            raise Unreadable(self._reading.reject(place, "not UTF-8", str(error.reason))) from error


class _Parts:
    """A stream parted by a separator."""

    def __init__(self, stream: Stream, head: bytes, start: int, separator: str | None) -> None:
        self._stream, self._data, self._start, self._before = stream, head, start, 0
        self._separator = separator.encode() if separator else b""
        self.is_at_end = False

    @property
    def at(self) -> int:
        """The position of what comes next."""
        return self._before + self._start

    def whole(self, limit: int) -> tuple[int, bytes] | None:
        """(position, the next part), or None if it has more than `limit` bytes."""
        seen = self._start
        while True:
            end = self._find(seen)
            held = (len(self._data) if end < 0 else end) - self._start
            if end >= 0 and held <= limit:
                at = self.at
                return at, self._taken(end)
            if held > limit + len(self._separator) or end >= 0:
                return None
            # A separator may lie across the end of what is held.
            seen = max(0, held - len(self._separator) + 1)
            if not self._more():
                if held > limit:
                    return None
                at, self.is_at_end = self.at, True
                return at, self._data[self._start :]

    def chunks(self) -> Iterator[bytes]:
        """The next part piece by piece."""
        while (end := self._find(self._start)) < 0:
            keep = len(self._data) - max(0, len(self._separator) - 1)
            if keep > self._start:
                part = self._data[self._start : min(keep, self._start + _BLOCK_BYTES)]
                self._start += len(part)
                yield part
            elif not self._more():
                self.is_at_end = True
                yield self._data[self._start :]
                return
        yield self._taken(end)

    def _find(self, start: int) -> int:
        return self._data.find(self._separator, start) if self._separator else -1

    def _taken(self, end: int) -> bytes:
        part = self._data[self._start : end]
        self._start = end + len(self._separator)
        return part

    def _more(self) -> bool:
        data = self._stream.read(_BLOCK_BYTES)
        self._before += self._start
        self._data = self._data[self._start :] + data
        self._start = 0
        return bool(data)

"""JSON lines: each line a record. Blocks of whole lines are parted and parsed at once."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from gristmill.data.raw import documents
from gristmill.data.raw.documents import FILTERED, Document
from gristmill.data.raw.readers import long_json
from gristmill.data.raw.readers.compressed import Stream, is_compressed
from gristmill.data.raw.readers.reading import Reading

_BLOCK_BYTES = 1 << 20


def read(reading: Reading) -> Iterator[Document]:
    """The documents of the lines that begin inside the span."""
    span = reading.span
    stop = span.stop if span.stop >= 0 else 1 << 62
    at = max(0, span.start - 1)
    with reading.open() as file:
        is_plain = not is_compressed(reading.item.place)
        if is_plain:
            file.seek(at)
        stream = reading.stream(file)
        if not is_plain:
            _skip(stream, at)
        lines = Lines(stream, at)
        if span.start > 0:
            # From the byte before: a line that begins exactly at `start` is not skipped.
            lines.skip_line()
        yield from of_lines(reading, lines, stop)


def of_lines(reading: Reading, lines: Lines, stop: int) -> Iterator[Document]:
    """The documents of the lines that begin before `stop`."""
    field = reading.form.text_field
    plain = reading.selection is None and "." not in field
    for at, block in lines.blocks(stop):
        if block is None:
            yield from _long_line(reading, lines)
        elif plain:
            yield from _plain(reading, at, block, field)
        else:
            yield from _records(reading, at, block)


def _plain(reading: Reading, at: int, block: bytes, field: str) -> Iterator[Document]:
    """The hot path: one field and no filter. What is odd about a line is found out later."""
    loads, find, view = orjson.loads, block.find, memoryview(block)
    start, size = 0, len(block)
    while start < size:
        end = find(b"\n", start)
        if end < 0:
            end = size
        try:
            # A view: no copy is made of the line.
            text = loads(view[start:end])[field]
        except (ValueError, KeyError, TypeError):
            text = None
        if type(text) is str:
            yield text
        elif end > start:
            found = judged(reading, at + start, block[start:end])
            if found is not None:
                yield found
        start = end + 1


def _records(reading: Reading, at: int, block: bytes) -> Iterator[Document]:
    for line in block.split(b"\n"):
        found = judged(reading, at, line)
        if found is not None:
            yield found
        at += len(line) + 1


def judged(reading: Reading, at: int, line: bytes) -> Document | None:
    """The document of a record as JSON, or None for white space."""
    try:
        record = reading.parse(at, line)
    except ValueError as error:
        return reading.unparsed(at, line, error) if line.strip() else None
    found = reading.records.text(record, at)
    return FILTERED if found is None else found


def _long_line(reading: Reading, lines: Lines) -> Iterator[Document]:
    """The document of a line that is too long to be held."""
    at = lines.at
    with long_json.Outline(reading, at) as outline:
        for piece in lines.rest_of_line():
            outline.add(piece)
        yield from outline.document()


class Lines:
    """A stream as blocks of whole lines; `at` is the position of what comes next."""

    def __init__(self, stream: Stream, at: int, head: bytes = b"") -> None:
        self._stream, self.at, self._head = stream, at, head

    def skip_line(self) -> None:
        """Go behind the next end of a line."""
        for _ in self.rest_of_line():
            pass

    def blocks(self, stop: int) -> Iterator[tuple[int, bytes | None]]:
        """(position, whole lines) while lines begin before `stop`.

        Instead of the lines None for one that is too long: it must be taken by `rest_of_line`.
        """
        while self.at < stop:
            data = self._stream.read(_BLOCK_BYTES)
            block = self._head + data if self._head else data
            if not block:
                return
            longest = documents.LONG_BYTES
            if len(block) > longest and block.find(b"\n", 0, longest + 1) < 0:
                self._head = block
                yield self.at, None
                continue
            end = block.rfind(b"\n") + 1 if data else len(block)
            if end > stop - self.at:
                # The line that holds the last byte of the span is the last to begin in it.
                end = block.find(b"\n", stop - 1 - self.at) + 1 or len(block)
            if not end:
                self._head = block
                continue
            self._head = block[end:]
            at = self.at
            self.at += end
            yield at, block[:end]

    def rest_of_line(self) -> Iterator[bytes]:
        """The line that comes next, without its end, in pieces."""
        data, self._head = self._head, b""
        while True:
            end = data.find(b"\n")
            if end >= 0:
                self._head = data[end + 1 :]
                self.at += end + 1
                yield data[:end]
                return
            self.at += len(data)
            yield data
            data = self._stream.read(_BLOCK_BYTES)
            if not data:
                return


def _skip(stream: Stream, count: int) -> None:
    while count > 0 and (data := stream.read(min(count, _BLOCK_BYTES))):
        count -= len(data)

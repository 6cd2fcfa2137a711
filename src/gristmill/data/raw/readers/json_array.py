"""`.json`: one array of records; or JSON lines, where it does not begin with a bracket."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gristmill.data.raw import documents
from gristmill.data.raw.documents import Document
from gristmill.data.raw.readers import jsonl, long_json
from gristmill.data.raw.readers.compressed import Stream
from gristmill.data.raw.readers.reading import BOM, Damaged, Reading

_BLOCK_BYTES = 1 << 20
_BETWEEN = re.compile(rb"[\s,]*")
# A whole string, a mark that begins one without its end, or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,\[\]{}\"]+")


def read(reading: Reading) -> Iterator[Document]:
    """The documents of the file, which is read whole."""
    with reading.open() as file:
        stream = reading.stream(file)
        head = stream.read(_BLOCK_BYTES)
        start = len(BOM) if head.startswith(BOM) else 0
        while head and not head[start:].strip() and (data := stream.read(_BLOCK_BYTES)):
            head += data
        start += len(head[start:]) - len(head[start:].lstrip())
        if head[start : start + 1] != b"[":
            yield from jsonl.of_lines(reading, jsonl.Lines(stream, 0, head), 1 << 62)
            return
        yield from _of_array(reading, _Buffer(stream, head, start + 1))


def _of_array(reading: Reading, buffer: _Buffer) -> Iterator[Document]:
    while True:
        first = buffer.next_element()
        if first == b"]":
            break
        if first == b"}":
            raise Damaged(f"a bracket at byte {buffer.at:,} closes nothing")
        at = buffer.at
        element = buffer.element()
        if element is None:
            yield from _long_element(reading, buffer)
        elif (found := jsonl.judged(reading, at, element)) is not None:
            yield found
    at = buffer.at
    if rest := buffer.rest():
        yield reading.reject(at, "bad JSON", f"after the end of the array: {rest[:40]!r}")


def _long_element(reading: Reading, buffer: _Buffer) -> Iterator[Document]:
    with long_json.Outline(reading, buffer.at) as outline:
        while (taken := outline.add(buffer.held(), one_value=True)) < 0:
            buffer.drop()
        buffer.skip(taken)
        yield from outline.document()


class _Buffer:
    """The stream from where the array's next element may begin."""

    def __init__(self, stream: Stream, data: bytes, start: int) -> None:
        self._stream, self._data, self._start = stream, data, start
        self._before = 0

    @property
    def at(self) -> int:
        """Position in the file's text."""
        return self._before + self._start

    def next_element(self) -> bytes:
        """Go to where the next element begins, or the end of the array; its first byte."""
        while True:
            found = _BETWEEN.match(self._data, self._start)
            assert found is not None
            self._start = found.end()
            if self._start < len(self._data):
                return self._data[self._start : self._start + 1]
            self._more(_BLOCK_BYTES)

    def element(self) -> bytes | None:
        """The element that begins here, or None if it is too long to be held."""
        while True:
            end = self._end_of_element()
            if end >= 0:
                if end - self._start > documents.LONG_BYTES:
                    return None
                element = self._data[self._start : end]
                self._start = end
                return element
            if len(self._data) - self._start > documents.LONG_BYTES:
                return None
            # Twice as much each time: what is held is looked through again.
            self._more(max(_BLOCK_BYTES, len(self._data) - self._start))

    def held(self) -> bytes:
        """What is held from here on."""
        return self._data[self._start :]

    def drop(self) -> None:
        """Go on behind what is held."""
        self._start = len(self._data)
        self._more(_BLOCK_BYTES)

    def skip(self, count: int) -> None:
        """Go on `count` bytes further."""
        self._start += count

    def rest(self) -> bytes:
        """What follows the end of the array, if it is not white space; its beginning."""
        rest = self._data[self._start + 1 :].strip()
        while not rest and (data := self._stream.read(_BLOCK_BYTES)):
            rest = data.strip()
        return rest

    def _end_of_element(self) -> int:
        """Where it ends in what is held, -1 if that is not known yet."""
        data, depth = self._data, 0
        if data[self._start] not in b'"[{':
            found = _SCALAR.match(data, self._start)
            return found.end() if found and found.end() < len(data) else -1
        for found in _TOKEN.finditer(data, self._start):
            token = found.group()
            if token in (b"{", b"["):
                depth += 1
            elif token == b'"':
                return -1
            elif token[0] != 0x22:
                depth -= 1
            if depth == 0:
                return found.end()
        return -1

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        if not data:
            raise Damaged(f"the array has no end; the last byte is {self.at:,}")
        self._before += self._start
        self._data = self._data[self._start :] + data
        self._start = 0

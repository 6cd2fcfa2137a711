"""Documents of a batch of Arrow columns; shared by parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gristmill.data.raw import documents
from gristmill.data.raw.documents import FILTERED, Document, Unreadable
from gristmill.data.raw.readers.reading import Reading
from gristmill.data.raw.select import MISSING

if TYPE_CHECKING:
    import pyarrow as pa

_PIECE_BYTES = 2 << 20


def top_columns(reading: Reading, names: list[str]) -> list[str]:
    """The top-level columns that the text and the filters lie in, in the file's order."""
    wanted = {_split(field, names)[0] for field in _fields(reading)}
    return [name for name in names if name in wanted]


def leaf_paths(reading: Reading, schema: pa.Schema) -> list[str]:
    """The text's and the filters' paths that there are, as parquet spells them."""
    found = []
    for field in sorted(_fields(reading)):
        name, path = _split(field, schema.names)
        if name and _has_path(schema.field(name).type, path):
            found.append(".".join([name, *path]))
    return found


def of_batch(
    reading: Reading, batch: pa.RecordBatch, first_row: int, names: list[str]
) -> Iterator[Document]:
    """The document of each row. `names` are the columns of the file, for messages."""
    kept = _kept(reading, batch)
    column = _column(batch, reading.form.text_field)
    records = reading.records
    if column is None:
        for row in range(batch.num_rows):
            is_kept = kept is None or kept[row]
            yield records.no_field(first_row + row, names) if is_kept else FILTERED
        return
    texts = _texts(reading, column, first_row)
    if kept is None:
        yield from texts
    else:
        yield from (text if k else FILTERED for text, k in zip(texts, kept, strict=True))


def without_columns(
    reading: Reading, num_rows: int, first_row: int, names: list[str]
) -> Iterator[Document]:
    """What rows are that have neither the text's column nor one of the filters'."""
    rules = reading.selection.rules if reading.selection is not None else ()
    kept = all(rule.keeps(MISSING) for rule in rules)
    for row in range(first_row, first_row + num_rows):
        yield reading.records.no_field(row, names) if kept else FILTERED


def _fields(reading: Reading) -> set[str]:
    selected = reading.selection.fields if reading.selection is not None else set()
    return {reading.form.text_field, *selected}


def _split(field: str, names: list[str]) -> tuple[str, list[str]]:
    """The column of a field and the path inside; "" when there is none."""
    if field in names:
        return field, []
    parts = field.split(".")
    for count in range(1, len(parts)):
        if (name := ".".join(parts[:count])) in names:
            return name, parts[count:]
    return "", []


def _has_path(kind: Any, path: list[str]) -> bool:
    import pyarrow as pa

    for name in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return True


def _column(batch: pa.RecordBatch, field: str) -> pa.Array | None:
    """The values of a field, nested ones as a.b."""
    import pyarrow.compute as pc

    name, path = _split(field, batch.schema.names)
    if not name:
        return None
    column = batch.column(name)
    if not _has_path(column.type, path):
        return None
    return pc.struct_field(column, path) if path else column


def _kept(reading: Reading, batch: pa.RecordBatch) -> list[bool] | None:
    """For each row whether the filters keep it; None without filters."""
    import pyarrow as pa

    if reading.selection is None:
        return None
    kept = [True] * batch.num_rows
    for rule in reading.selection.rules:
        column = _column(batch, rule.field)
        if column is None:
            values: list[Any] = [MISSING] * batch.num_rows
        else:
            if pa.types.is_temporal(column.type):
                column = column.cast(pa.string())
            elif pa.types.is_decimal(column.type):
                column = column.cast(pa.float64())
            values = column.to_pylist()
        kept = [k and rule.keeps(value) for k, value in zip(kept, values, strict=True)]
    return kept


def _texts(reading: Reading, column: pa.Array, first_row: int) -> Iterator[Document]:
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not (
        kinds.is_string(kind)
        or kinds.is_large_string(kind)
        or kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
        or kinds.is_string_view(kind)
        or kinds.is_binary_view(kind)
    ):
        for row in range(len(column)):
            yield reading.records.not_text(first_row + row, str(kind))
        return
    if kinds.is_string_view(kind) or kinds.is_binary_view(kind):
        column = column.cast(pa.large_binary())
    yield from _decoded(reading, column, first_row)


def _decoded(reading: Reading, column: pa.Array, first_row: int) -> Iterator[Document]:
    """The texts of a column of bytes, cut out of its one buffer."""
    import pyarrow as pa

    is_large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    _, offsets_buffer, data_buffer = column.buffers()
    num_rows = len(column)
    if not num_rows:
        return
    offsets = (
        memoryview(offsets_buffer)
        .cast("B")
        .cast("q" if is_large else "i")[column.offset : column.offset + num_rows + 1]
        .tolist()
    )
    data = memoryview(data_buffer) if data_buffer is not None else memoryview(b"")
    valid = column.is_valid().to_pylist() if column.null_count else None
    longest = documents.LONG_BYTES
    for row in range(num_rows):
        if valid is not None and not valid[row]:
            yield reading.records.not_text(first_row + row, "null")
            continue
        start, stop = offsets[row], offsets[row + 1]
        if stop - start > longest:
            yield LongCell(reading, first_row + row, data[start:stop])
            continue
        try:
            yield str(data[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            yield _not_utf8(reading, first_row + row, error)


def _not_utf8(reading: Reading, row: int, error: UnicodeDecodeError) -> Document:
    return reading.reject(row, "not UTF-8", f"byte {error.start:,} of the text: {error.reason}")


class LongCell:
    """The text of a long cell, in pieces of the buffer that it lies in."""

    def __init__(self, reading: Reading, row: int, data: memoryview) -> None:
        self._reading, self._row, self._data = reading, row, data

    def pieces(self) -> Iterator[str]:
        """The text in order, a few MB at a time. Raises `Unreadable`."""
        at, end = 0, len(self._data)
        while at < end:
            stop = min(end, at + _PIECE_BYTES)
            # Back to the beginning of a character.
            while stop < end and at + _PIECE_BYTES - stop < 4 and self._data[stop] & 0xC0 == 0x80:
                stop -= 1
            try:
                piece = str(self._data[at:stop], "utf-8")
            except UnicodeDecodeError as error:
                detail = f"byte {at + error.start:,} of the text: {error.reason}"
                reject = self._reading.reject(self._row, "not UTF-8", detail)
                raise Unreadable(reject) from error
            yield piece
            at = stop

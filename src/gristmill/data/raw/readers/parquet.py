"""Parquet files: each row a record. Only the columns that are needed are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gristmill.data.raw.documents import Document
from gristmill.data.raw.readers import columns
from gristmill.data.raw.readers.reading import Damaged, Reading

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 8192
_READ_BYTES = 1 << 20
# A row group's columns are fetched from a store in one go up to this size, else bit by bit.
_MAX_FETCHED_BYTES = 256 << 20


def read(reading: Reading) -> Iterator[Document]:
    """The documents of the row groups that begin inside the span."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading.open_native() as file:
        try:
            parquet = pq.ParquetFile(
                file, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except pa.ArrowException as error:
            raise Damaged(_said(error)) from error
        names = parquet.schema_arrow.names
        leaves = columns.leaf_paths(reading, parquet.schema_arrow)
        first_row = 0
        for number in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            if rows and _begins_inside(reading, parquet.metadata, number):
                source = _source(reading, parquet, file, number, leaves)
                yield from _row_group(reading, source, number, leaves, first_row, names)
            first_row += rows


def _row_group(
    reading: Reading,
    parquet: pq.ParquetFile,
    number: int,
    leaves: list[str],
    first_row: int,
    names: list[str],
) -> Iterator[Document]:
    import pyarrow as pa

    group = parquet.metadata.row_group(number)
    if not leaves:
        yield from columns.without_columns(reading, group.num_rows, first_row, names)
        return
    batches = parquet.iter_batches(
        batch_size=_batch_rows(group, leaves),
        row_groups=[number],
        columns=leaves,
        use_threads=False,
    )
    seen = 0
    while True:
        try:
            batch = next(batches, None)
        except pa.ArrowException as error:
            raise Damaged(f"row group {number}: {_said(error)}") from error
        if batch is None:
            break
        yield from columns.of_batch(reading, batch, first_row + seen, names)
        seen += batch.num_rows
    if seen != group.num_rows:
        raise Damaged(f"row group {number} has {seen:,} rows instead of {group.num_rows:,}")


def _begins_inside(reading: Reading, metadata: Any, number: int) -> bool:
    group = metadata.row_group(number)
    if not group.num_columns:
        return reading.span.start == 0
    first = group.column(0)
    at = first.data_page_offset
    if first.has_dictionary_page and first.dictionary_page_offset:
        at = min(at, first.dictionary_page_offset)
    stop = reading.span.stop
    return bool(reading.span.start <= at and (stop < 0 or at < stop))


def _chunks(group: Any, leaves: list[str]) -> Iterator[Any]:
    """What the metadata say of the columns that are read."""
    for number in range(group.num_columns):
        column = group.column(number)
        path = column.path_in_schema
        if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves):
            yield column


def _batch_rows(group: Any, leaves: list[str]) -> int:
    """Rows that make a batch of about `_BATCH_BYTES`."""
    size = sum(column.total_uncompressed_size for column in _chunks(group, leaves))
    fitting = _BATCH_BYTES * int(group.num_rows) // max(int(size), 1)
    return max(1, min(_MAX_BATCH_ROWS, fitting))


def _source(
    reading: Reading, parquet: pq.ParquetFile, file: Any, number: int, leaves: list[str]
) -> pq.ParquetFile:
    """The file as it is best read: many small reads are slow from an object store."""
    import pyarrow.parquet as pq

    if reading.root.is_local:
        return parquet
    group = parquet.metadata.row_group(number)
    size = sum(column.total_compressed_size for column in _chunks(group, leaves))
    if size > _MAX_FETCHED_BYTES:
        return parquet
    return pq.ParquetFile(
        file, metadata=parquet.metadata, pre_buffer=True, page_checksum_verification=True
    )


def _said(error: Exception) -> str:
    """The first sentence of Arrow's message."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__

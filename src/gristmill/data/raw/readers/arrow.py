"""Arrow files and streams, in which a Hugging Face dataset is saved to disk: each row a record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gristmill.data.raw.documents import Document
from gristmill.data.raw.readers import columns
from gristmill.data.raw.readers.reading import Damaged, Reading

if TYPE_CHECKING:
    import pyarrow as pa

_FILE = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read(reading: Reading) -> Iterator[Document]:
    """The documents of the file, which is read whole."""
    import pyarrow as pa

    with reading.open_native() as file:
        is_file = file.read(len(_FILE)) == _FILE
        if not is_file:
            if reading.item.size < len(_END_OF_STREAM):
                raise Damaged("there is not even an end mark")
            file.seek(-len(_END_OF_STREAM), os.SEEK_END)
            if file.read() != _END_OF_STREAM:
                # Arrow itself takes any end between two batches for the end.
                raise Damaged("the stream has no end mark")
        file.seek(0)
        first_row = 0
        try:
            names, batches = _batches(reading, file, is_file)
            for batch in batches:
                yield from columns.of_batch(reading, batch, first_row, names)
                first_row += batch.num_rows
        except pa.ArrowException as error:
            raise Damaged(str(error).splitlines()[0]) from error


def _batches(
    reading: Reading, file: Any, is_file: bool
) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """Names of all columns, and the batches of those that are needed."""
    import pyarrow as pa

    names = (
        pa.ipc.open_file(file).schema.names if is_file else pa.ipc.open_stream(file).schema.names
    )
    wanted = columns.top_columns(reading, names)
    # Without any column the number of rows would be lost.
    fields = [names.index(name) for name in wanted or names[:1]]
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    file.seek(0)
    if not is_file:
        return names, iter(pa.ipc.open_stream(file, options=options))
    opened = pa.ipc.open_file(file, options=options)
    return names, (opened.get_batch(n) for n in range(opened.num_record_batches))

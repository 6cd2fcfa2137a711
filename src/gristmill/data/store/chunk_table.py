"""The chunks of a dataset as a table: `chunks.npy`, which is mapped and never read whole at once.

One row a chunk: name, tokens, documents, bytes, digest, and whether its last document goes on in
the next chunk. The file is a plain NumPy array; equal tables are equal bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from gristmill.data.storage import Storage
from gristmill.data.store.chunks import ChunkRecord
from gristmill.util.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

NAME = "chunks.npy"

_BLOCK = 8192
# A table up to this size is checked whenever it is opened; larger ones by `data verify`.
_CHECKED_BYTES = 4 << 20


class ChunkTable:
    """The chunks of a dataset in order: `len`, `table[i]` and iteration give `ChunkRecord`s.

    Columns are arrays over all chunks; a mapped table reads of the disk only what is looked at.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        self._rows = rows

    @classmethod
    def of(cls, records: Iterable[ChunkRecord]) -> ChunkTable:
        """The table of these chunks, taken one by one."""
        builder = TableBuilder()
        for record in records:
            builder.add(record)
        return builder.table()

    @classmethod
    def read(cls, place: Path | Storage, digest: str, num_chunks: int) -> ChunkTable:
        """The table beside a manifest that gives its digest and its length.

        A local one is mapped. Raises RunError when it is missing or not the one of the manifest.
        """
        storage = place if isinstance(place, Storage) else Storage(place)
        where = storage.at(NAME)
        try:
            if storage.is_local:
                # A plain array over the mapping: slicing np.memmap itself is many times slower.
                rows = np.load(where, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            else:
                rows = np.load(io.BytesIO(storage.read(NAME)), allow_pickle=False)
        except FileNotFoundError:
            raise RunError(
                f"{where} is missing. copy the whole dataset again, or prepare it again."
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise RunError(
                f"{where} is damaged ({error}). copy it again, or prepare the dataset again."
            ) from error
        table = cls(rows)
        if not table._is_sound(num_chunks) or (
            rows.nbytes <= _CHECKED_BYTES and table.digest != digest
        ):
            raise RunError(
                f"{where} is not the table that the manifest beside it names. copy both again, "
                "or prepare the dataset again with --overwrite."
            )
        return table

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self._rows)

    def __getitem__(self, index: int) -> ChunkRecord:
        """One chunk."""
        return _record(self._rows[index].item())

    def __iter__(self) -> Iterator[ChunkRecord]:
        """All chunks in order, without holding them all."""
        for start in range(0, len(self), _BLOCK):
            yield from map(_record, self._rows[start : start + _BLOCK].tolist())

    @property
    def tokens(self) -> Int64s:
        """Tokens of each chunk, int64[chunks]."""
        return self._rows["tokens"].astype(np.int64)

    @property
    def documents(self) -> Int64s:
        """Items in the header of each chunk, int64[chunks]."""
        return self._rows["documents"].astype(np.int64)

    @property
    def sizes(self) -> Int64s:
        """Size of each file, int64[chunks]."""
        return self._rows["bytes"].astype(np.int64)

    @property
    def continues(self) -> NDArray[np.bool_]:
        """Whether the last document of each chunk goes on in the next, bool[chunks]."""
        return np.array(self._rows["continues"], dtype=bool)

    @cached_property
    def digest(self) -> str:
        """128-bit digest of the file that `to_bytes` gives, in hex."""
        digest = xxhash.xxh3_128(self._header())
        digest.update(np.ascontiguousarray(self._rows).view(np.uint8).data)
        return digest.hexdigest()

    def dataset_id(self, dtype: str) -> str:
        """The identity of a dataset with these chunks, as 64 hexadecimal digits.

        It is of the contents and of how to read them: the same data under other file names is the
        same dataset.
        """
        digest = hashlib.sha256(f"gristmill-dataset 2 {dtype}\n".encode())
        for start in range(0, len(self), _BLOCK):
            block = self._rows[start : start + _BLOCK].tolist()
            lines = (
                f"{tokens} {documents} {xxh3.hex()} {int(continues)}\n"
                for _, tokens, documents, _, xxh3, continues in block
            )
            digest.update("".join(lines).encode())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The contents of `chunks.npy`."""
        return self._header() + self._rows.tobytes()

    def _header(self) -> bytes:
        file = io.BytesIO()
        about = np.lib.format.header_data_from_array_1_0(self._rows)
        np.lib.format.write_array_header_1_0(file, about)
        return file.getvalue()

    def _is_sound(self, num_chunks: int) -> bool:
        """Whether rows and columns are as they should be."""
        names = self._rows.dtype.names
        if self._rows.shape != (num_chunks,) or names is None or "name" not in names:
            return False
        return bool(self._rows.dtype == _kind(self._rows.dtype["name"].itemsize))


class TableBuilder:
    """A table in the making, compact from the first row on."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[Any]] = []
        self._pending: list[ChunkRecord] = []

    def add(self, record: ChunkRecord) -> None:
        """Append a chunk."""
        self._pending.append(record)
        if len(self._pending) == _BLOCK:
            self._flush()

    def table(self) -> ChunkTable:
        """The table of what was added."""
        self._flush()
        width = max((rows.dtype["name"].itemsize for rows in self._blocks), default=1)
        kind = _kind(width)
        blocks = [rows.astype(kind, copy=False) for rows in self._blocks]
        return ChunkTable(np.concatenate(blocks or [np.empty(0, kind)]))

    def _flush(self) -> None:
        block, self._pending = self._pending, []
        if not block:
            return
        names = [record.name.encode() for record in block]
        rows = np.zeros(len(block), dtype=_kind(max(map(len, names))))
        rows["name"] = names
        for column in ("tokens", "documents", "bytes", "continues"):
            rows[column] = [getattr(record, column) for record in block]
        rows["xxh3"] = np.frombuffer(
            b"".join(bytes.fromhex(record.xxh3) for record in block), dtype="V16"
        )
        self._blocks.append(rows)


def _kind(name_bytes: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("name", f"S{name_bytes}"),
            ("tokens", "<i8"),
            ("documents", "<i8"),
            ("bytes", "<i8"),
            ("xxh3", "V16"),
            ("continues", "?"),
        ]
    )


def _record(row: tuple[Any, ...]) -> ChunkRecord:
    name, tokens, documents, size, xxh3, continues = row
    return ChunkRecord(name.decode(), tokens, documents, size, xxh3.hex(), continues)

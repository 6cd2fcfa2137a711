"""Best-fit packing of documents into rows, as a plan that is derived from a dataset and kept.

    documents ──cut at seq_len──▶ pieces ──histogram──▶ compositions ──▶ rows of whole pieces

A document of up to `seq_len + 1` tokens lies in one row from its first token to its last; a longer
one is cut so that each of its targets stands in one piece. Rows hold pieces of one chunk, then
padding. The plan is a pure function of the dataset and `seq_len`: it may be lost at any time.

Pieces are placed best-fit decreasing. As in arXiv:2107.02027 (longest-pack-first histogram packing)
this is done for all pieces of a length and all rows with equal room at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gristmill.data.store.chunks import MappedChunk
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import RunError, UserError
from gristmill.util.paths import user_cache_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

VERSION = 1
"""Of the way rows are made; other rows are another stream."""

_TABLE, _STARTS, _ROW_ENDS, _SUMMARY = "chunks.npy", "starts.u32", "row_ends.u32", "plan.json"
# A piece of one token has no target: room for less than two tokens is full.
_LEAST = 2

# A composition as a chain: (what is in the row already, length of pieces, how many of them).
_Chain = tuple[Any, int, int] | None


@dataclass(frozen=True)
class PackSummary:
    """What packing makes of a dataset, in numbers of one epoch."""

    rows: int
    pieces: int
    tokens: int
    """Tokens in rows; one that a cut repeats is counted in both pieces."""
    documents: int
    cut: int
    """Documents that are longer than a row."""
    seq_len: int

    @property
    def padding(self) -> float:
        """Share of the rows that holds no token."""
        return 1 - self.tokens / max(1, self.rows * (self.seq_len + 1))

    @property
    def cut_share(self) -> float:
        """Share of the documents that is cut."""
        return self.cut / max(1, self.documents)


class PackPlan:
    """Which pieces of documents make up each row of each chunk; arrays that are mapped."""

    def __init__(
        self,
        summary: PackSummary,
        table: Int64s,
        starts: NDArray[np.uint32],
        row_ends: NDArray[np.uint32],
    ) -> None:
        self.summary = summary
        self.chunk_rows: Int64s = table[0]
        """Rows of each chunk, int64[chunks]."""
        self._first_row = np.cumsum(table[0]) - table[0]
        self._first_piece = np.cumsum(table[1]) - table[1]
        self._starts, self._row_ends = starts, row_ends

    def places(self, mapped: MappedChunk, chunk: int, row: int) -> tuple[Int64s, NDArray[np.int32]]:
        """Where the tokens of a row are in their chunk, int64[tokens], and where its pieces end."""
        at, first = int(self._first_row[chunk]) + row, int(self._first_piece[chunk])
        begin = first + (int(self._row_ends[at - 1]) if row else 0)
        starts = self._starts[begin : first + int(self._row_ends[at])].astype(np.int64)
        header, width = int(mapped.offsets[0]), mapped.tokens.itemsize
        # Of the header's own type: NumPy would convert the whole header otherwise.
        wanted = (header + starts * width).astype(np.uint32)
        after = mapped.offsets[np.searchsorted(mapped.offsets, wanted, side="right")]
        stops = (after.astype(np.int64) - header) // width
        sizes = np.minimum(stops - starts, self.summary.seq_len + 1)
        ends = np.cumsum(sizes)
        places = np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
        return places, ends.astype(np.int32)


def pack_lengths(lengths: Int64s, width: int) -> tuple[Int64s, int]:
    """The row of each piece, best-fit decreasing, int64[pieces], and how many rows there are.

    Lengths are 2 to `width`, the length of a row.
    """
    counts = np.bincount(lengths, minlength=width + 1)
    present = np.flatnonzero(counts)[::-1]
    groups = _compositions(present.tolist(), counts[present].tolist(), width)
    base = 0
    parts: list[tuple[int, int, int, int]] = []  # first row, rows, length, pieces in each row
    for rows, chain in groups:
        while chain is not None:
            chain, length, each = chain
            parts.append((base, rows, length, each))
        base += rows
    first, rows_of, length_of, each_of = np.array(parts, dtype=np.int64).reshape(-1, 4).T
    places = rows_of * each_of
    within = np.arange(int(places.sum())) - np.repeat(np.cumsum(places) - places, places)
    place_row = np.repeat(first, places) + within // np.repeat(each_of, places)
    # Places and pieces of one length are as many: the first piece gets the first place.
    by_length = np.argsort(np.repeat(length_of, places), kind="stable")
    row = np.empty(len(lengths), dtype=np.int64)
    row[np.argsort(lengths, kind="stable")] = place_row[by_length]
    return row, base


def _compositions(
    lengths: Sequence[int], counts: Sequence[int], width: int
) -> list[tuple[int, _Chain]]:
    """Rows of equal composition, as their number and what is in each; longest lengths first."""
    done: list[tuple[int, _Chain]] = []
    open_rows: dict[int, list[tuple[int, _Chain]]] = {}  # by the room that is left
    rooms: list[int] = []  # keys of open_rows, sorted

    def put(room: int, rows: int, chain: _Chain) -> None:
        if room < _LEAST:
            done.append((rows, chain))
        elif room in open_rows:
            open_rows[room].append((rows, chain))
        else:
            open_rows[room] = [(rows, chain)]
            insort(rooms, room)

    for length, left in zip(lengths, counts, strict=True):
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, rows, chain = width, left, None
            else:
                room = rooms[at]
                rows, chain = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            # A row that has taken one has the least room of all that could take the next.
            each = room // length
            full = min(rows, left // each)
            left -= full * each
            if full:
                put(room - length * each, full, (chain, length, each))
            if full < rows and left:
                put(room - length * left, 1, (chain, length, left))
                full, left = full + 1, 0
            if full < rows and room < width:
                put(room, rows - full, chain)
    return done + [group for room in rooms for group in open_rows[room]]


@dataclass(frozen=True)
class ChunkRows:
    """The rows of one chunk: where pieces begin, row after row, and pieces up to each row's end."""

    starts: NDArray[np.uint32]
    row_ends: NDArray[np.uint32]
    tokens: int
    documents: int
    cut: int


def pack_chunk(ends: Int64s, seq_len: int) -> ChunkRows:
    """The rows of a chunk whose documents end at `ends`.

    A document of n tokens is in ceil((n - 1) / seq_len) pieces that overlap by one token, so that
    each of its n - 1 targets is in one of them; one of a single token has none and is left out.
    Rows come in the order of their first pieces, pieces in that of the chunk.
    """
    width = seq_len + 1
    lengths = np.diff(ends, prepend=0)
    pieces = -(-(np.maximum(lengths, 1) - 1) // seq_len)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(ends - lengths, pieces) + number * seq_len
    sizes = np.minimum(np.repeat(ends, pieces) - starts, width)
    row, rows = pack_lengths(sizes, width)
    # Pieces lie in the order of the chunk: the first one of a row is its first appearance.
    _, first = np.unique(row, return_index=True)
    rank = np.empty(rows, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(rows)
    row = rank[row]
    return ChunkRows(
        starts=starts[np.argsort(row, kind="stable")].astype("<u4"),
        row_ends=np.cumsum(np.bincount(row, minlength=rows)).astype("<u4"),
        tokens=int(sizes.sum()),
        documents=int((lengths > 0).sum()),
        cut=int((lengths > width).sum()),
    )


def find_plan(dataset: Dataset, seq_len: int) -> PackPlan:
    """The plan of a dataset, from the user's cache or made now and put there.

    Raises UserError for a dataset on an object store, whose headers are not here; RunError when
    the cache cannot be written.
    """
    if dataset.cache is not None:
        raise UserError(
            f"{dataset.path} is on an object store, and packing needs the lengths of all documents "
            "before the first batch. copy it to a disk, or leave packing out.",
            {"--train.packing": "concat"},
        )
    folder = user_cache_dir() / "packing"
    place = folder / f"{dataset.dataset_id[:32]}-{seq_len}-v{VERSION}"
    found = _read(place, len(dataset.chunks))
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{place.name}.lock"):
            found = _read(place, len(dataset.chunks))
            if found is not None:
                return found  # another process has made it meanwhile
            scrap = folder / f"{place.name}.partial"
            for old in (scrap, place):  # what a killed process, or a damaged disk, has left
                shutil.rmtree(old, ignore_errors=True)
            scrap.mkdir()
            _write(scrap, dataset, seq_len)
            os.rename(scrap, place)
    except OSError as error:
        raise RunError(
            f"the packing plan cannot be written to {folder} ({error.strerror or error}). make "
            "room there, or name another place for caches: XDG_CACHE_HOME=DIR."
        ) from error
    found = _read(place, len(dataset.chunks))
    assert found is not None
    return found


def _write(folder: Path, dataset: Dataset, seq_len: int) -> None:
    """Make the plan chunk by chunk; the summary, without which nothing counts, is last."""
    table = np.zeros((2, len(dataset.chunks)), dtype=np.int64)
    tokens = documents = cut = 0
    with (folder / _STARTS).open("wb") as starts, (folder / _ROW_ENDS).open("wb") as row_ends:
        for number in range(len(dataset.chunks)):
            rows = pack_chunk(dataset.map(number).ends, seq_len)
            table[:, number] = len(rows.row_ends), len(rows.starts)
            starts.write(rows.starts.data)
            row_ends.write(rows.row_ends.data)
            tokens, documents, cut = (
                tokens + rows.tokens,
                documents + rows.documents,
                cut + rows.cut,
            )
        _to_disk(starts)
        _to_disk(row_ends)
    with (folder / _TABLE).open("wb") as file:
        np.save(file, table)
        _to_disk(file)
    num_rows, pieces = (int(n) for n in table.sum(axis=1))
    summary = PackSummary(num_rows, pieces, tokens, documents, cut, seq_len)
    with (folder / _SUMMARY).open("wb") as file:
        file.write(json.dumps(asdict(summary)).encode())
        _to_disk(file)


def _read(place: Path, num_chunks: int) -> PackPlan | None:
    """The plan in a directory; None when there is none, or not all of it."""
    try:
        summary = PackSummary(**json.loads((place / _SUMMARY).read_bytes()))
        table = np.load(place / _TABLE, allow_pickle=False)
        starts, row_ends = _mapped(place / _STARTS), _mapped(place / _ROW_ENDS)
    except (OSError, ValueError, TypeError, EOFError):
        return None
    rows, pieces = summary.rows, summary.pieces
    sound = (
        table.shape == (2, num_chunks)
        and table.sum(axis=1).tolist() == [rows, pieces]
        and (len(row_ends), len(starts)) == (rows, pieces)
    )
    return PackPlan(summary, table, starts, row_ends) if sound else None


def _mapped(path: Path) -> NDArray[np.uint32]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype="<u4")  # nothing cannot be mapped
    # A plain array over the mapping: slicing np.memmap itself is many times slower.
    return np.memmap(path, dtype="<u4", mode="r").view(np.ndarray)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time, and given back also by a killed one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

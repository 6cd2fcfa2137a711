"""Small pieces of raw text, spread over all of it, each standing for the bytes around it.

A piece is work for `units.run_unit`: what a sample gives is found by what prepares the whole.
"""

from __future__ import annotations

import contextlib
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gristmill.data.preparation.plan import Plan, Recipe, Units, weight
from gristmill.data.preparation.split import Split
from gristmill.data.raw import sources
from gristmill.data.raw.documents import Input
from gristmill.data.storage import Storage
from gristmill.util.errors import UserError

PLACES = 64
_BLOCK_BYTES = 1 << 20
# What is unpacked to see how tightly files are packed: of one, and of all.
_PACKED_BYTES = 32 << 20
# Text in front of a piece of a compressed file, which has to be unpacked too.
_MAX_SKIPPED = 256 << 20


@dataclass(frozen=True)
class Piece:
    """A plan of one unit below `root`, and the bytes of input files it stands for.

    `overhead_s` is time that only a sample takes: unpacking what lies in front of it.
    """

    plan: Plan
    root: Storage
    stands_for: float
    overhead_s: float = 0.0


def everything(recipe: Recipe, root: Storage, inputs: Sequence[Input]) -> Iterator[Piece]:
    """All of the inputs, for text so small that a sample would save nothing."""
    for item in inputs:
        yield _whole(recipe, root, [item])


def spread(
    recipe: Recipe, root: Storage, inputs: Sequence[Input], text_bytes: int, scratch: Path
) -> Iterator[Piece]:
    """Pieces of about `text_bytes` of text each, in an order such that those first are spread too.

    `scratch` is an empty folder for copies of parts that no span describes.
    """
    ends = np.cumsum([item.size for item in inputs])
    packing: dict[int, _Packing] = {}
    chance = random.Random(len(inputs))
    for place in _spread_numbers(PLACES):
        # Anywhere in its share of the text: equal steps may fall in step with the text's own order.
        at = min(int(ends[-1] * (place + chance.random()) / PLACES), int(ends[-1]) - 1)
        number = int(np.searchsorted(ends, at, side="right"))
        item = inputs[number]
        inside = at - int(ends[number] - item.size)
        suffixes = PurePosixPath(item.place.lower()).suffixes[-2:]
        if weight(item) <= text_bytes:
            yield _whole(recipe, root, _neighbours(inputs, number, text_bytes))
        elif recipe.records == "records" and suffixes[-1:] == [".parquet"]:
            start, stop, share = _row_group(root, item, inside)
            yield _part(recipe, root, item, start, stop, share * item.size)
        elif sources.is_parted(recipe.format, item.place):
            start = min(inside, item.size - text_bytes)
            yield _part(recipe, root, item, start, start + text_bytes, text_bytes)
        elif recipe.records == "records" and suffixes in _PACKED_LINES:
            if number not in packing:
                packing[number] = _Packing.of(root, item)
            yield packing[number].piece(recipe, root, item, inside, text_bytes)
        elif recipe.records == "text" and suffixes[-1:] not in ([".gz"], [".zst"]):
            yield _slice(recipe, root, item, inside, text_bytes, scratch / f"{place}.txt")
        else:
            yield _whole(recipe, root, [item])


_PACKED_LINES = [[a, b] for a in (".jsonl", ".ndjson") for b in (".gz", ".zst")]


def _spread_numbers(count: int) -> list[int]:
    """0 … count - 1 (a power of two), each prefix spread over the range: the bits reversed."""
    bits = count.bit_length() - 1
    return [int(f"{number:0{bits}b}"[::-1], 2) for number in range(count)]


def _neighbours(inputs: Sequence[Input], number: int, text_bytes: int) -> list[Input]:
    """Small inputs from `number` on that hold `text_bytes` together."""
    found: list[Input] = []
    size = 0
    for item in inputs[number:]:
        if found and size + weight(item) > text_bytes:
            break
        found.append(item)
        size += weight(item)
    return found


def _whole(recipe: Recipe, root: Storage, items: Sequence[Input]) -> Piece:
    spans = [(number, 0, -1) for number in range(len(items))]
    return Piece(_plan(recipe, items, spans), root, sum(item.size for item in items))


def _part(
    recipe: Recipe, root: Storage, item: Input, start: int, stop: int, stands_for: float
) -> Piece:
    return Piece(_plan(recipe, [item], [(0, start, stop)]), root, stands_for)


def _plan(recipe: Recipe, items: Sequence[Input], spans: Sequence[tuple[int, int, int]]) -> Plan:
    columns = np.array(spans, dtype=np.int64).reshape(-1, 3)
    units = Units(np.array([0, len(spans)], dtype=np.int64), columns)
    return Plan(recipe, tuple(items), units, Split(recipe.seed, -1, 0))


def _row_group(root: Storage, item: Input, at: int) -> tuple[int, int, float]:
    """The row group around byte `at` of a parquet file: its span, and its share of the data."""
    from pyarrow import ArrowException, parquet

    try:
        with root.open(item.place) as file:
            metadata = parquet.ParquetFile(file).metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            firsts = [_first_byte(group) for group in groups]
            sizes = [
                sum(group.column(c).total_compressed_size for c in range(group.num_columns))
                for group in groups
            ]
    except (OSError, ArrowException) as error:
        raise UserError(
            f"{root.at(item.place)} is damaged or cannot be read ({error}). fetch it again, "
            "or narrow the pattern."
        ) from error
    if not groups:
        return 0, -1, 1.0
    number = max(0, int(np.searchsorted(firsts, at, side="right")) - 1)
    start = 0 if number == 0 else firsts[number]
    stop = firsts[number + 1] if number + 1 < len(firsts) else -1
    return start, stop, sizes[number] / max(1, sum(sizes))


def _first_byte(group: Any) -> int:
    """Where a row group begins: at its first column's dictionary, if it has one."""
    column = group.column(0)
    pages = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        pages.append(column.dictionary_page_offset)
    return int(min(pages))


def _slice(
    recipe: Recipe, root: Storage, item: Input, at: int, text_bytes: int, path: Path
) -> Piece:
    """A part of a large text file, as a file of its own; characters are not cut."""
    with root.open(item.place) as file:
        file.seek(min(at, item.size - text_bytes))
        data = b""
        while len(data) < text_bytes and (more := file.read(text_bytes - len(data))):
            data += more
    path.write_bytes(data.decode("utf-8", "ignore").encode())
    scratch = Storage(path.parent)
    entry = scratch.stat(path.name)
    copy = Input(item.path, path.name, entry.size, entry.version)
    return Piece(_plan(recipe, [copy], [(0, 0, -1)]), scratch, len(data))


@dataclass(frozen=True)
class _Packing:
    """How a compressed file of lines is packed: bytes of text, and the time a byte takes."""

    text_bytes: int
    seconds_per_byte: float

    @classmethod
    def of(cls, root: Storage, item: Input) -> _Packing:
        started = time.perf_counter()
        with root.open(item.place) as file:
            read, text = _unpacked(file.read, gzipped=item.place.lower().endswith(".gz"))
        seconds = time.perf_counter() - started
        total = item.size * text // read if text else weight(item)
        return cls(total, seconds / max(1, text))

    def piece(self, recipe: Recipe, root: Storage, item: Input, at: int, length: int) -> Piece:
        """The lines that begin in `length` bytes of text, as far on as `at` is in the file."""
        # Short of the end: how much text there is was estimated.
        latest = max(0, self.text_bytes - 2 * length)
        start = min(self.text_bytes * at // max(1, item.size), latest, _MAX_SKIPPED)
        stop = start + min(length, self.text_bytes)
        stands_for = item.size * (stop - start) / max(1, self.text_bytes)
        plan = _plan(recipe, [item], [(0, start, stop)])
        return Piece(plan, root, stands_for, start * self.seconds_per_byte)


def _unpacked(read: Callable[[int], bytes], *, gzipped: bool) -> tuple[int, int]:
    """(bytes read, bytes they unpack to) from the beginning of a compressed file.

    Damage ends it: the unit that reads the file will say so.
    """
    import zstandard

    def fresh() -> Any:
        if gzipped:
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor().decompressobj()

    taken = text = 0
    decoder = fresh()
    with contextlib.suppress(zlib.error, zstandard.ZstdError):
        while taken < _PACKED_BYTES and (data := read(_BLOCK_BYTES)):
            while data:
                text += len(decoder.decompress(data))
                left = decoder.unused_data
                taken += len(data) - len(left)
                if decoder.eof:  # files may be several compressed ones, joined
                    decoder = fresh()
                data = left
    return max(1, taken), text

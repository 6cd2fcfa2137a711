"""Chunk files and their index, readable by litdata's TokensLoader: writing, mapping, adopting.

A chunk is little-endian `u32 n | u32[n + 1] offsets | tokens`: n documents, the byte offset of each
(and the file's size), then all tokens. `index.json` lists the chunks. The offsets are the document
index: where documents end is never guessed from the tokens.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from gristmill.util.errors import RunError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tokens = NDArray[Any]
    Int64s = NDArray[np.int64]

MAX_CHUNK_TOKENS = 2**29 - 2
"""Offsets are u32: four bytes a token, and four in the header if each is a document, fit."""

# litdata's numbers for element types, by the name NumPy has for them.
_WRITTEN_FORMATS = {
    **{t: f"no_header_numpy:{n}" for n, t in {1: "int16", 2: "int32", 3: "int64"}.items()},
    **{t: f"no_header_numpy:{n}" for n, t in {4: "uint8", 5: "uint16", 6: "uint32"}.items()},
}
_READ_FORMATS = {
    **{f"no_header_numpy:{n}": t for n, t in {1: "int16", 2: "int32", 3: "int64"}.items()},
    **{f"no_header_numpy:{n}": t for n, t in {4: "uint8", 5: "uint16", 6: "uint32"}.items()},
    **{f"no_header_tensor:{n}": t for n, t in {11: "uint8", 14: "int16", 16: "int32"}.items()},
    **{f"no_header_tensor:{n}": t for n, t in {18: "int64", 20: "uint16"}.items()},
}
_SCANS = 16
_ENDS = 4096
_READ_BYTES = 4 << 20
_ONE_LEAF = json.dumps([1, {"type": None, "context": None, "children_spec": []}])


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk file in a manifest. `documents` counts the items of its header."""

    name: str
    tokens: int
    documents: int
    bytes: int
    xxh3: str
    """128-bit digest of the file in hex; of header and ends only for an adopted chunk."""
    continues: bool = False
    """Its last document goes on as the first of the next chunk."""


@dataclass(frozen=True)
class MappedChunk:
    """A chunk on disk, mapped into memory: its tokens and its document index, both read-only."""

    tokens: Tokens
    offsets: NDArray[np.uint32]
    """The header's own: where each document begins in the file, and the file's size."""
    continues: bool

    @property
    def ends(self) -> Int64s:
        """The index after the last token of each item, int64 [items]."""
        offsets = self.offsets.astype(np.int64)
        ends: Int64s = (offsets[1:] - offsets[0]) // self.tokens.itemsize
        return ends

    def ends_within(self, start: int, stop: int) -> NDArray[np.int32]:
        """Where documents end in tokens `start` to `stop`: indices after a last one, from `start`.

        Of the header, only what is looked at is read.
        """
        first, width = int(self.offsets[0]), self.tokens.itemsize
        bounds = np.array([first + start * width, first + stop * width], dtype=np.uint32)
        begin, end = np.searchsorted(self.offsets, bounds, side="right")
        found = (self.offsets[begin:end].astype(np.int64) - first) // width - start
        if self.continues and end == len(self.offsets):
            found = found[:-1]  # cut here, not ended
        if (found[1:] == found[:-1]).any():
            found = np.unique(found)  # litdata writes documents without tokens too
        return found.astype(np.int32)


def dtype_for(num_token_ids: int) -> str:
    """The element type that holds every id below `num_token_ids`."""
    return "uint16" if num_token_ids <= 2**16 else "uint32"


def write_chunk(
    path: Path, parts: Iterable[Tokens], lengths: Int64s, dtype: str, *, continues: bool = False
) -> ChunkRecord:
    """Write a chunk of the documents in `parts`, joined, whose `lengths` are in tokens.

    The file is on the disk when this returns, under the name given: renaming it is the caller's.
    """
    element = np.dtype(dtype).newbyteorder("<")
    tokens = int(lengths.sum())
    assert 0 < tokens <= MAX_CHUNK_TOKENS
    assert int(lengths.min()) > 0, "litdata cannot read documents without tokens"
    first = 4 * (len(lengths) + 2)
    header = np.empty(len(lengths) + 2, dtype="<u4")
    header[:2] = len(lengths), first
    header[2:] = first + element.itemsize * np.cumsum(lengths)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for array in itertools.chain([header], parts):
            kind = header.dtype if array is header else element
            data = np.ascontiguousarray(array, dtype=kind).view(np.uint8).data
            digest.update(data)
            file.write(data)
        assert file.tell() == first + tokens * element.itemsize
        file.flush()
        os.fsync(file.fileno())
    return ChunkRecord(
        name=path.name,
        tokens=tokens,
        documents=len(lengths),
        bytes=first + tokens * element.itemsize,
        xxh3=digest.hexdigest(),
        continues=continues,
    )


def map_chunk(path: Path, record: ChunkRecord, dtype: str) -> MappedChunk:
    """The chunk at `path`, mapped. Raises RunError when it is not the one of `record`."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                raise RunError(
                    f"{path} is damaged: it has {size:,} bytes, its manifest says "
                    f"{record.bytes:,}. copy it again, or prepare the dataset again with "
                    "--overwrite."
                )
            # A plain array over the mapping: np.memmap is many times slower to make and to slice.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise RunError(
            f"cannot read {path} ({error.strerror}). restore it, or prepare the dataset again."
        ) from error
    data: Any = np.frombuffer(mapping, dtype=np.uint8)
    first = 4 * (record.documents + 2)
    header = data[:first].view("<u4") if size > first else np.zeros(3, dtype="<u4")
    element = np.dtype(dtype).newbyteorder("<")
    if header[0] != record.documents or header[1] != first or header[-1] != size:
        raise RunError(
            f"{path} is damaged: its header does not agree with its size. copy it again, "
            "or prepare the dataset again with --overwrite."
        )
    return MappedChunk(data[first:].view(element), header[1:], record.continues)


def index_json(
    chunks: Iterable[ChunkRecord], dtype: str, chunk_tokens: int, dataset_id: str
) -> str:
    """The text of litdata's `index.json` for these chunks, a chunk a line."""
    listed = ",\n".join(
        f'{{"chunk_bytes": {c.bytes}, "chunk_size": {c.documents}, "dim": {c.tokens}, '
        f'"filename": {json.dumps(c.name)}}}'
        for c in chunks
    )
    config = {
        "chunk_bytes": None,
        "chunk_size": chunk_tokens,
        "compression": None,
        "data_format": [_WRITTEN_FORMATS[dtype]],
        "data_spec": _ONE_LEAF,
        "encryption": None,
        "item_loader": "TokensLoader",
    }
    # litdata keeps its cache under this value: the same dataset anywhere has the same one.
    updated_at = str(int(dataset_id[:12], 16))
    rest = f'"config": {json.dumps(config)},\n"updated_at": "{updated_at}"'
    return f'{{"chunks": [\n{listed}\n],\n{rest}}}\n'


@dataclass(frozen=True)
class LitdataIndex:
    """What litdata's `index.json` says: element type, its entry for each chunk, compression."""

    dtype: str
    chunks: list[dict[str, Any]]
    compression: str | None


def adopt(folder: Path) -> tuple[list[ChunkRecord], str]:
    """Chunks and element type of a litdata token dataset in `folder`, from one scan of its headers.

    Raises UserError when it is not one that can be read, saying what is wrong with it.
    """
    index = read_index(folder)
    if index.compression:
        raise UserError(
            f"{folder} cannot be read where it is: its chunks are compressed "
            f"({index.compression}). unpack them: gristmill data import {folder} --copy "
            "--output_dir OUT"
        )
    # Headers wait for the disk or the network, not for the processor.
    with ThreadPoolExecutor(_SCANS) as pool:
        found = pool.map(lambda c: scan(folder / c["filename"], c, index.dtype), index.chunks)
        return list(found), index.dtype


def read_index(folder: Path) -> LitdataIndex:
    """The index of the litdata dataset in `folder`. Raises UserError when it holds no tokens."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        config, listed = index["config"], index["chunks"]
        return LitdataIndex(_adoptable(folder, config, listed), listed, config.get("compression"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / 'index.json'} is no index that litdata wrote ({error!r}). "
            "prepare the text again with `gristmill prepare`."
        ) from error


def _adoptable(folder: Path, config: dict[str, Any], listed: list[dict[str, Any]]) -> str:
    compression = config.get("compression")
    if compression and compression.partition(":")[0] != "zstd":
        problem = f"its chunks are compressed with {compression}, which is not known here"
    elif config.get("encryption"):
        problem = "its chunks are encrypted"
    elif not listed:
        problem = "it has no chunks"
    elif config.get("item_loader") != "TokensLoader" or any(c["dim"] is None for c in listed):
        problem = (
            "it was written without item_loader=TokensLoader() (dim is null), so that its chunks "
            "do not say where tokens begin, and litdata cannot stream tokens from it either"
        )
    elif len(config["data_format"]) != 1 or config["data_format"][0] not in _READ_FORMATS:
        problem = f"its items are {config['data_format']}, not one array of whole numbers"
    else:
        return _READ_FORMATS[config["data_format"][0]]
    raise UserError(
        f"{folder} cannot be read as tokens: {problem}. "
        "prepare the text again with `gristmill prepare`."
    )


def scan(path: Path, listed: dict[str, Any], dtype: str) -> ChunkRecord:
    """The record of a litdata chunk, with the digest of header and ends only.

    Raises UserError unless its header agrees with its size and with its entry in the index.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            documents = int.from_bytes(file.read(4), "little")
            header = file.read(4 * (documents + 1)) if 4 * documents < size else b""
    except OSError as error:
        raise UserError(
            f"the index names {path}, which cannot be read ({error.strerror}). copy it again."
        ) from error
    offsets = np.frombuffer(header[: len(header) // 4 * 4], dtype="<u4").astype(np.int64)
    first, tokens = 4 * (documents + 2), listed["dim"]
    sound = (
        documents == listed["chunk_size"]
        and len(offsets) == documents + 1
        and offsets[0] == first
        and offsets[-1] == size == first + tokens * np.dtype(dtype).itemsize
        and bool(np.all(np.diff(offsets) >= 0))
    )
    if not sound:
        raise UserError(
            f"{path} is damaged or incomplete: its header ({documents:,} documents) does not agree "
            f"with its size ({size:,} bytes) and the index ({tokens:,} tokens). copy it again."
        )
    return ChunkRecord(listed["filename"], tokens, documents, size, digest_of_ends(path))


def digest_of_ends(path: Path) -> str:
    """128-bit digest of a chunk's header and of the first and last 4096 bytes of its tokens."""
    with path.open("rb") as file:
        documents = int.from_bytes(file.read(4), "little")
        start = file.read(4 * (documents + 1) + _ENDS)
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _ENDS))
        return xxhash.xxh3_128(start + file.read()).hexdigest()


def digest_of_all(path: Path) -> str:
    """128-bit digest of a whole file."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()

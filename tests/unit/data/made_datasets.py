"""Small datasets made without `prepare`, ours and those of other tools."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import zstandard

from gristmill.data.store import chunk_table, manifest
from gristmill.data.store.chunk_table import ChunkTable
from gristmill.data.store.chunks import index_json, write_chunk
from gristmill.data.store.dataset import Dataset, described


def make_dataset(
    folder: Path, chunk_lengths: list[list[int]], *, cut: int | None = None
) -> Dataset:
    """Chunks of documents with these lengths, whose tokens count up."""
    folder.mkdir(parents=True)
    chunks, value = [], 0
    for number, lengths in enumerate(chunk_lengths):
        tokens = np.arange(value, value + sum(lengths))
        value += len(tokens)
        path = folder / f"chunk-{number}.bin"
        counted = np.array(lengths, dtype=np.int64)
        chunks.append(write_chunk(path, [tokens], counted, "uint16", continues=number == cut))
    table = ChunkTable.of(chunks)
    contents = dataclasses.replace(
        described(table, "uint16", whole_digests=True), num_token_ids=value
    )
    (folder / chunk_table.NAME).write_bytes(table.to_bytes())
    index = index_json(table, "uint16", 2**24, contents.dataset_id)
    (folder / "index.json").write_text(index)
    (folder / manifest.NAME).write_text(manifest.to_json(contents))
    return Dataset.open(folder)


def write_litdata(
    folder: Path,
    chunks: list[list[list[int]]],
    *,
    name: str = "int32",
    kind: str = "no_header_tensor:16",
    compression: str | None = None,
    rank: int = 0,
) -> Path:
    """A litdata token dataset: chunks of documents of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, documents in enumerate(chunks):
        parts = [np.array(document, dtype=name).tobytes() for document in documents]
        first = 4 * (len(parts) + 2)
        ends = np.cumsum([first, *map(len, parts)])
        data = struct.pack(f"<{len(parts) + 2}I", len(parts), *ends) + b"".join(parts)
        suffix = ".zstd.bin" if compression else ".bin"
        filename = f"chunk-{rank}-{number}{suffix}"
        packed = zstandard.compress(data) if compression else data
        (folder / filename).write_bytes(packed)
        tokens = sum(map(len, documents))
        entry = {"chunk_bytes": len(data), "chunk_size": len(parts), "dim": tokens}
        listed.append(entry | {"filename": filename})
    config = {"compression": compression, "data_format": [kind], "item_loader": "TokensLoader"}
    (folder / "index.json").write_text(json.dumps({"chunks": listed, "config": config}))
    return folder


def documents_of(dataset: Dataset) -> list[list[int]]:
    """All documents of a dataset, parted where its chunks part them."""
    found: list[list[int]] = []
    for number in range(len(dataset.chunks)):
        mapped = dataset.map(number)
        starts = [0, *mapped.ends[:-1].tolist()]
        found += [
            mapped.tokens[a:b].tolist() for a, b in zip(starts, mapped.ends.tolist(), strict=True)
        ]
    return found

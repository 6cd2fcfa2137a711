"""Datasets of known documents for the tests of looking at data."""

from pathlib import Path

import numpy as np

from gristmill.data.store.chunks import index_json, write_chunk


def write_dataset(folder: Path, chunks: list[list[int]], *, first_id: int = 0) -> Path:
    """A litdata dataset of chunks, each given as its documents' lengths; ids count up."""
    folder.mkdir(parents=True)
    records = []
    for number, lengths in enumerate(chunks):
        tokens = (first_id + np.arange(sum(lengths))).astype("uint16")
        first_id += sum(lengths)
        path = folder / f"chunk-0-{number}.bin"
        records.append(write_chunk(path, [tokens], np.array(lengths, dtype=np.int64), "uint16"))
    text = index_json(records, "uint16", 1024, "0" * 64)
    (folder / "index.json").write_text(text, encoding="utf-8")
    return folder

"""Check datasets from the first byte to the last: `gristmill data verify`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gristmill.config.data_commands import DataVerify, listed
from gristmill.data.storage import Storage
from gristmill.data.store import manifest
from gristmill.data.store.chunk_table import ChunkTable
from gristmill.data.store.chunks import ChunkRecord, digest_of_all, digest_of_ends, map_chunk
from gristmill.data.store.dataset import Dataset
from gristmill.data.store.manifest import Manifest
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

# Tokens whose range is looked at in one go.
_BLOCK = 1 << 22
_NAMED = 20


def run(cfg: DataVerify) -> None:
    """Check the datasets and print what was found. Raises RunError when something is wrong."""
    places = [Storage(path) for path in listed(cfg.data_path)]
    if not places:
        raise UserError("name a dataset. for example: gristmill data verify OUT")
    workers = (os.cpu_count() or 1) if cfg.num_workers == "auto" else int(cfg.num_workers)
    if workers < 1:
        raise UserError(f"--num_workers {workers} is too few. give 1 or more, or auto.")
    wrong: list[str] = []
    for place in [below for given in places for below in datasets_below(given)]:
        found = problems(place.root, num_workers=workers)
        print(f"{place.root}: " + (f"{len(found):,} wrong" if found else "sound"))
        wrong += found
    if wrong:
        more = [f"… and {len(wrong) - _NAMED:,} more"] if len(wrong) > _NAMED else []
        raise RunError(
            "\n".join(
                [
                    f"{len(wrong):,} of what the manifests say is not so:",
                    *(f"  {line}" for line in [*wrong[:_NAMED], *more]),
                    "copy what is damaged again, or prepare the dataset again with --overwrite.",
                ]
            )
        )


def datasets_below(place: Storage) -> list[Storage]:
    """The dataset there, or those in its folders, such as train and val."""
    if _is_dataset(place):
        return [place]
    if place.is_local:
        names = sorted(os.listdir(place.path)) if place.path.is_dir() else []
    else:
        names = ["train", "val"]
    inside = [below for name in names if _is_dataset(below := place.below(name))]
    return inside or [place]


def _is_dataset(place: Storage) -> bool:
    return place.exists(manifest.NAME) or place.exists("index.json")


@dataclass(frozen=True)
class _Checked:
    """A dataset as its own files describe it."""

    place: Storage
    contents: Manifest
    chunks: ChunkTable

    @classmethod
    def open(cls, place: Storage) -> _Checked:
        if place.is_local:
            dataset = Dataset.open(place.path, check=False)
            return cls(place, dataset.manifest, dataset.chunks)
        contents = manifest.read(place)
        table = ChunkTable.read(place, contents.chunk_table, contents.totals.chunks)
        return cls(place, contents, table)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A file of the dataset on this machine, while the block lasts."""
        if self.place.is_local:
            yield self.place.path / name
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            self.place.fetch(name, path)
            yield path


def problems(path: str | Path, *, num_workers: int = 1) -> list[str]:
    """All that is wrong with a dataset, one line each; nothing when it is sound.

    Every byte is read; from a URL, through a temporary file for each chunk. Raises UserError when
    there is no dataset at all.
    """
    try:
        dataset = _Checked.open(Storage(path))
    except RunError as error:
        return [str(error)]
    found = list(_of_tables(dataset))
    tokens = dataset.contents.totals.tokens
    with ThreadPoolExecutor(num_workers) as pool:
        done, next_line = 0, 1 << 30
        checks = pool.map(
            lambda number: _of_chunk(dataset, dataset.chunks[number]), range(len(dataset.chunks))
        )
        for number, wrong in enumerate(checks):
            found += wrong
            done += dataset.chunks[number].tokens
            if done >= next_line:
                print(f"{path}: {done:,} of {tokens:,} tokens are checked", file=sys.stderr)
                next_line = done + (1 << 30)
    return found


def _of_tables(dataset: _Checked) -> Iterator[str]:
    """What does not agree between manifest, table of chunks, index and tokenizer."""
    contents, table, at = dataset.contents, dataset.chunks, dataset.place.at
    if table.digest != contents.chunk_table:
        yield f"{at('chunks.npy')} is not the table that the manifest names"
    if table.dataset_id(contents.dtype) != contents.dataset_id:
        yield f"{at(manifest.NAME)}: the dataset id is not that of the chunks"
    if (total := int(table.tokens.sum())) != contents.totals.tokens:
        yield f"{at(manifest.NAME)}: {contents.totals.tokens:,} tokens, the chunks {total:,}"
    yield from _of_index(dataset)
    if contents.tokenizer is not None:
        try:
            digest = _tokenizer_digest(dataset)
        except UserError as error:
            yield str(error)
        else:
            if digest != contents.tokenizer.digest:
                yield f"{at('tokenizer')} is not the tokenizer that made the tokens"


def _tokenizer_digest(dataset: _Checked) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for entry in dataset.place.list("tokenizer"):
            dataset.place.fetch(entry.name, Path(folder) / Path(entry.name).name)
        return Tokenizer.load(folder).digest


def _of_index(dataset: _Checked) -> Iterator[str]:
    where = dataset.place.at("index.json")
    try:
        chunks = json.loads(dataset.place.read("index.json"))["chunks"]
        names = ("filename", "dim", "chunk_size")
        found = [tuple(chunk[name] for name in names) for chunk in chunks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{where} cannot be read ({error!r}); litdata needs it"
        return
    if found != [(c.name, c.tokens, c.documents) for c in dataset.chunks]:
        yield f"{where} lists other chunks than the manifest"


def _of_chunk(dataset: _Checked, record: ChunkRecord) -> list[str]:
    """What is wrong with a chunk file."""
    try:
        with dataset.file(record.name) as path:
            try:
                return _of_file(dataset, record, path)
            except RunError as error:
                return [str(error).replace(str(path), dataset.place.at(record.name))]
    except OSError as error:
        return [f"{dataset.place.at(record.name)} cannot be read ({error.strerror or error})"]


def _of_file(dataset: _Checked, record: ChunkRecord, file: Path) -> list[str]:
    mapped = map_chunk(file, record, dataset.contents.dtype)
    digest = digest_of_all(file) if dataset.contents.whole_digests else digest_of_ends(file)
    path, num_token_ids = dataset.place.at(record.name), dataset.contents.num_token_ids
    found = []
    if digest != record.xxh3:
        found.append(f"{path} has other contents than were written (its digest differs)")
    offsets = mapped.offsets.astype(np.int64)
    lengths = np.diff(offsets)
    if bool((lengths < 0).any()) or bool((lengths % mapped.tokens.itemsize).any()):
        found.append(f"{path}: documents do not follow one another (its offsets are damaged)")
    for start in range(0, len(mapped.tokens), _BLOCK):
        block = mapped.tokens[start : start + _BLOCK]
        low, high = int(block.min()), int(block.max())
        if low < 0 or (num_token_ids is not None and high >= num_token_ids):
            ids = "0 or more" if num_token_ids is None else f"0 to {num_token_ids - 1}"
            found.append(f"{path} holds the token id {low if low < 0 else high}, not {ids}")
            break
    return found

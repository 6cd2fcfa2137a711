"""Check datasets from the first byte to the last: `gristmill data verify`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gristmill.config.data_commands import DataVerify, listed
from gristmill.data.chunks import ChunkRecord, digest_of_all, digest_of_ends, map_chunk
from gristmill.data.dataset import Dataset
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

# Tokens whose range is looked at in one go.
_BLOCK = 1 << 22
_NAMED = 20


def run(cfg: DataVerify) -> None:
    """Check the datasets and print what was found. Raises RunError when something is wrong."""
    paths = [Path(path).expanduser() for path in listed(cfg.data_path)]
    if not paths:
        raise UserError("name a dataset. for example: gristmill data verify OUT")
    workers = (os.cpu_count() or 1) if cfg.num_workers == "auto" else int(cfg.num_workers)
    if workers < 1:
        raise UserError(f"--num_workers {workers} is too few. give 1 or more, or auto.")
    wrong: list[str] = []
    folders = [folder for path in paths for folder in datasets_below(path)]
    for folder in folders:
        found = problems(folder, num_workers=workers)
        print(f"{folder}: " + (f"{len(found):,} things are wrong" if found else "sound"))
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


def datasets_below(path: Path) -> list[Path]:
    """The dataset at `path`, or those in its folders, such as train and val."""
    if (path / "manifest.json").exists() or (path / "index.json").exists() or not path.is_dir():
        return [path]
    inside = sorted(
        folder
        for folder in path.iterdir()
        if (folder / "manifest.json").exists() or (folder / "index.json").exists()
    )
    return inside or [path]


def problems(folder: Path, *, num_workers: int = 1) -> list[str]:
    """All that is wrong with a dataset, one line each; nothing when it is sound.

    Every byte is read. Raises UserError when there is no dataset at all.
    """
    try:
        dataset = Dataset.open(folder, check=False)
    except RunError as error:
        return [str(error)]
    found = list(_of_tables(dataset))
    largest = dataset.manifest.num_token_ids
    tokens = dataset.num_tokens
    with ThreadPoolExecutor(num_workers) as pool:
        done, next_line = 0, 1 << 30
        checks = pool.map(lambda n: _of_chunk(dataset, dataset.chunks[n], largest), _all(dataset))
        for number, chunk_problems in enumerate(checks):
            found += chunk_problems
            done += dataset.chunks[number].tokens
            if done >= next_line:
                print(f"{folder}: {done:,} of {tokens:,} tokens are checked", file=sys.stderr)
                next_line = 2 * done
    return found


def _all(dataset: Dataset) -> range:
    return range(len(dataset.chunks))


def _of_tables(dataset: Dataset) -> Iterator[str]:
    """What does not agree between manifest, table of chunks, index and tokenizer."""
    contents, table = dataset.manifest, dataset.chunks
    where = dataset.storage.path
    if table.digest != contents.chunk_table:
        yield f"{where / 'chunks.npy'} is not the table that the manifest names"
    if table.dataset_id(contents.dtype) != contents.dataset_id:
        yield f"{where / 'manifest.json'}: the dataset id is not that of the chunks"
    if (total := int(table.tokens.sum())) != contents.totals.tokens:
        yield f"{where / 'manifest.json'}: {contents.totals.tokens:,} tokens, the chunks {total:,}"
    yield from _of_index(dataset)
    if contents.tokenizer is not None:
        try:
            digest = Tokenizer.load(where / "tokenizer").digest
        except UserError as error:
            yield str(error)
        else:
            if digest != contents.tokenizer.digest:
                yield f"{where / 'tokenizer'} is not the tokenizer that made the tokens"


def _of_index(dataset: Dataset) -> Iterator[str]:
    path = dataset.storage.path / "index.json"
    try:
        chunks = json.loads(path.read_text(encoding="utf-8"))["chunks"]
        names = ("filename", "dim", "chunk_size")
        found = [tuple(chunk[name] for name in names) for chunk in chunks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be read ({error!r}); litdata needs it"
        return
    expected = [(c.name, c.tokens, c.documents) for c in dataset.chunks]
    if found != expected:
        yield f"{path} lists other chunks than the manifest"


def _of_chunk(dataset: Dataset, record: ChunkRecord, num_token_ids: int | None) -> list[str]:
    """What is wrong with a chunk file."""
    path = dataset.storage.path / record.name
    try:
        mapped = map_chunk(path, record, dataset.dtype)
        whole = dataset.manifest.whole_digests
        digest = digest_of_all(path) if whole else digest_of_ends(path)
    except RunError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror})"]
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

"""A dataset on disk or on an object store: its manifest, and its chunks mapped into memory."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gristmill.data.preparation.workspace import is_unfinished
from gristmill.data.reading.chunk_cache import ChunkCache, Wanted
from gristmill.data.storage import Storage, is_url
from gristmill.data.store import manifest, packed
from gristmill.data.store.chunk_table import ChunkTable
from gristmill.data.store.chunks import MappedChunk, adopt, map_chunk
from gristmill.data.store.manifest import Manifest, Totals
from gristmill.util.errors import RunError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A mapping keeps a file descriptor, and many systems allow 1024 of them.
_MAX_MAPPED = 256
# Files of a dataset with more chunks are looked at when they are read, not when it is opened.
_MAX_CHECKED = 4096
_SCANNED_BYTES = 1 << 30
_TRIES = 3


class Dataset:
    """A prepared dataset, or a litdata token dataset adopted where it is. Nothing is written.

    `chunks` lists the chunk files in their order; `map(i)` gives the tokens of one.
    """

    def __init__(
        self,
        path: Path | str,
        contents: Manifest,
        chunks: ChunkTable,
        cache: ChunkCache | None = None,
    ) -> None:
        self.path = path
        """The directory, or the URL."""
        self.storage = Storage(path)
        self.cache = cache
        """Where chunks of an object store come to lie; None for a directory."""
        self.manifest = contents
        self.dataset_id = contents.dataset_id
        self.dtype = contents.dtype
        self.chunks = chunks
        self.num_tokens = contents.totals.tokens
        self.num_documents = contents.totals.documents
        self.text_bytes = contents.totals.text_bytes
        """Bytes of the text in UTF-8; None for an adopted dataset."""
        self._mapped: OrderedDict[int, MappedChunk] = OrderedDict()

    @classmethod
    def open(
        cls, path: str | Path, *, check: bool = True, cache: ChunkCache | None = None
    ) -> Dataset:
        """The dataset in the directory `path`; with `check`, its files are looked for.

        At a URL it needs a `cache` before chunks are read. Raises UserError when there is none, it
        is unfinished or empty, or litdata chunks there cannot be read as tokens; RunError when a
        chunk is missing or has another size.
        """
        if is_url(path):
            return cls._open_remote(str(path), cache)
        folder = Path(path).expanduser()
        if (folder / manifest.NAME).is_file():
            contents = manifest.read(folder)
            table = ChunkTable.read(folder, contents.chunk_table, contents.totals.chunks)
            _check_element_type(folder / manifest.NAME, contents, table)
            dataset = cls(folder, contents, table)
        elif (folder / "index.json").is_file() and not is_unfinished(folder):
            dataset = cls(folder, *_adopted(folder))
        else:
            raise UserError(_why_not(folder))
        if dataset.num_tokens == 0:
            raise UserError(
                f"{folder} holds no tokens ({len(dataset.chunks)} chunks). prepare other text."
            )
        if check and len(dataset.chunks) <= _MAX_CHECKED:
            for number in range(len(dataset.chunks)):
                dataset._check(number)
        return dataset

    @classmethod
    def _open_remote(cls, url: str, cache: ChunkCache | None) -> Dataset:
        storage = Storage(url)
        if not storage.exists(manifest.NAME):
            raise UserError(
                f"there is no finished dataset at {url} (no {manifest.NAME}). check the URL, or "
                f"look at what is there: gristmill prepare status {url}"
            )
        contents = manifest.read(storage)
        table = _fetched_table(storage, contents)
        _check_element_type(storage.at(manifest.NAME), contents, table)
        if contents.totals.tokens == 0:
            raise UserError(f"{url} holds no tokens. prepare other text.")
        if not contents.whole_digests:
            raise UserError(
                f"{url} was adopted in place, so its chunks cannot be checked on their way here. "
                f"copy it in full: gristmill data import {url} --output_dir OUT --copy"
            )
        return cls(url, contents, table, cache)

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer's files inside the dataset, on this machine; None where there are none."""
        if self.cache is None:
            folder = self.storage.path / "tokenizer"
            return folder if folder.is_dir() else None
        entries = list(self.storage.list("tokenizer"))
        folder = self.cache.folder / "tokenizers" / self.dataset_id[:32]
        folder.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            target = folder / entry.name.removeprefix("tokenizer/")
            scrap = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
            try:
                self.storage.fetch(entry.name, scrap)
                os.replace(scrap, target)  # another process may be reading it
            finally:
                scrap.unlink(missing_ok=True)
        return folder if entries else None

    @cached_property
    def num_token_ids(self) -> int:
        """Largest id + 1: the tokenizer's, or for an adopted dataset that of its tokens."""
        known = self.manifest.num_token_ids
        return known if known is not None else self.largest_id() + 1

    @cached_property
    def chunk_tokens(self) -> NDArray[np.int64]:
        """Tokens of each chunk, int64[chunks]."""
        return self.chunks.tokens

    def map(self, chunk: int) -> MappedChunk:
        """A chunk's tokens, in the dataset's element type, and where its documents end."""
        if chunk not in self._mapped:
            self._mapped[chunk] = self._map(chunk)
            # A file that the cache removes takes room on the disk as long as it is mapped.
            while len(self._mapped) > (_MAX_MAPPED if self.cache is None else 1):
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(chunk)
        return self._mapped[chunk]

    def wanted(self, chunk: int) -> Wanted:
        """A chunk of an object store as the cache knows it."""
        return Wanted(self.storage, self.chunks[chunk])

    def _map(self, chunk: int) -> MappedChunk:
        record = self.chunks[chunk]
        if self.cache is None:
            return map_chunk(self.storage.path / record.name, record, self.dtype)
        wanted = Wanted(self.storage, record)
        with self.cache.open(wanted) as path:
            try:
                return map_chunk(path, record, self.dtype)
            except RunError:
                path.unlink()  # damaged on this disk: the store has it whole
        with self.cache.open(wanted) as path:
            return map_chunk(path, record, self.dtype)

    def _check(self, number: int) -> None:
        record = self.chunks[number]
        path = self.storage.path / record.name
        if not path.is_file() or path.stat().st_size != record.bytes:
            map_chunk(path, record, self.dtype)  # says what is wrong

    def largest_id(self) -> int:
        """The largest id of all tokens; of more than 1 GB, an even sample is looked at.

        Raises UserError for an id below 0.
        """
        share = max(1, -(-int(self.chunks.sizes.sum()) // _SCANNED_BYTES))
        largest = 0
        for number in range(len(self.chunks)):
            tokens = self.map(number).tokens
            scanned = tokens[: max(1, len(tokens) // share)]
            lowest = int(scanned.min(initial=0))
            if lowest < 0:
                raise UserError(
                    f"{self.storage.at(self.chunks[number].name)} holds the token id {lowest}. "
                    "prepare the text again: ids are 0 or more."
                )
            largest = max(largest, int(scanned.max(initial=0)))
        return largest


def _fetched_table(storage: Storage, contents: Manifest) -> ChunkTable:
    """The chunk table of a dataset at a URL, asked for again when it does not come as it is."""
    for attempt in range(_TRIES):
        try:
            table = ChunkTable.read(storage, contents.chunk_table, contents.totals.chunks)
        except RunError:
            if attempt == _TRIES - 1:
                raise
            continue
        if table.digest == contents.chunk_table:
            return table
    raise RunError(
        f"the table of chunks at {storage.root} is not the one that its manifest names. copy both "
        "again, or prepare the dataset again."
    )


def _check_element_type(where: Path | str, contents: Manifest, table: ChunkTable) -> None:
    """Raise RunError unless ids of the manifest's element type fill the chunks exactly.

    Read as another type, they would be other ids, and training would not notice.
    """
    known = contents.num_token_ids
    with contextlib.suppress(TypeError):  # no element type at all
        element = np.dtype(contents.dtype)
        width = element.itemsize
        if (
            element.kind in "iu"
            and (known is None or known - 1 <= np.iinfo(element).max)
            and np.array_equal(table.sizes, 4 * (table.documents + 2) + width * table.tokens)
        ):
            return
    ids = "" if known is None else f" and ids up to {known - 1:,}"
    raise RunError(
        f"{where} says that token ids are {contents.dtype}, which does not agree with its chunks"
        f"{ids}. copy the dataset again, or prepare it again with --overwrite."
    )


def described(table: ChunkTable, dtype: str, *, whole_digests: bool) -> Manifest:
    """The manifest of chunks that another tool wrote: all that they say themselves."""
    return Manifest(
        dataset_id=table.dataset_id(dtype),
        dtype=dtype,
        num_token_ids=None,
        totals=Totals(
            tokens=int(table.tokens.sum()),
            # One that is cut is counted where it ends.
            documents=int(table.documents.sum()) - int(table.continues.sum()),
            chunks=len(table),
            text_bytes=None,
        ),
        chunk_table=table.digest,
        whole_digests=whole_digests,
        tokenizer=None,
        source=None,
    )


def _adopted(folder: Path) -> tuple[Manifest, ChunkTable]:
    chunks, dtype = adopt(folder)
    table = ChunkTable.of(chunks)
    return described(table, dtype, whole_digests=False), table


def _why_not(folder: Path) -> str:
    if not folder.exists():
        return f"there is no dataset {folder}. check the path, or make one: gristmill prepare"
    if is_unfinished(folder):
        return f"{folder} is not finished. run the `gristmill prepare` command of it again."
    inside = [name for name in ("train", "val") if (folder / name / "index.json").is_file()]
    if inside:
        return f"{folder} holds the datasets {' and '.join(inside)}. name {folder / inside[0]}."
    if packed.find(folder):
        return (
            f"{folder} holds packed files (LITPKDS). turn them into datasets: "
            f"gristmill data import {folder} --copy --output_dir NEW"
        )
    return (
        f"{folder} is no dataset (neither manifest.json nor index.json is there). make one of raw "
        f"text: gristmill prepare. pretraining also takes the text itself: --data TextFiles "
        f"--data.train_data_path {folder}"
    )

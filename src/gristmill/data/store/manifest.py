"""The manifest of a dataset: what it is, where it came from, and the digest of its chunk table.

`manifest.json` is written last and is what makes a dataset visible. It holds no absolute paths,
times or names of machines: the same input gives the same bytes anywhere. The chunks are listed in
`chunks.npy` beside it (`chunk_table.py`), so that reading a manifest costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.data.storage import Storage
from gristmill.util.errors import UserError

NAME = "manifest.json"
FORMAT = "gristmill-dataset"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that made the ids, and what was put around each document."""

    digest: str
    """SHA-256 of the defining file, which lies in `tokenizer/`."""
    bos_id: int | None
    """Id before each document."""
    eos_id: int | None
    """Id after each document."""
    engine: str
    """What encoded, with its version."""
    parity: str
    """How the engine was checked against the definition."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the dataset. `text_bytes` counts UTF-8; None where the text is not known."""

    tokens: int
    documents: int
    chunks: int
    text_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the text came from: the job that prepared it and its inputs."""

    plan: str
    """Hash of the plan: inputs, their contents, and every option that shapes the dataset."""
    layout: str
    seed: int
    chunk_tokens: int
    val_fraction: float
    split: str
    """`train` or `val` of a split, else empty."""
    inputs: tuple[tuple[str, int], ...]
    """Relative path and bytes of each input file."""
    rejects: Mapping[str, int]
    """Documents of the whole job that could not be read, by reason."""
    empty_documents: int
    """Documents of the whole job without text, which are left out."""
    filtered: int = 0
    """Documents of the whole job that filters or the user's function left out."""
    text_field: str = "text"
    separator: str | None = None
    """Text that parted files into documents."""
    filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was asked of the records' fields, as declared."""
    map: str | None = None
    """The user's function that chose or changed documents, as module:function."""
    map_digest: str | None = None
    """Digest of that function's source, where it could be read."""
    val_pattern: str | None = None
    """Which files are validation, where they were given."""
    fast_dev_run: bool = False
    """Only a little of the text was taken, to try things."""
    quarantined: tuple[tuple[str, str], ...] = ()
    """Damaged inputs, or parts of them, that were left out, and why."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know of a dataset. `tokenizer` and `source` are None for an
    adopted one."""

    dataset_id: str
    """Digest of the chunks' contents and of how to read them: the same data is the same dataset."""
    dtype: str
    num_token_ids: int | None
    """Largest id of the tokenizer + 1; None where it is not known."""
    totals: Totals
    chunk_table: str
    """Digest of `chunks.npy`."""
    whole_digests: bool
    """Chunks have digests of the whole file; else, for one adopted in place, of header and ends."""
    tokenizer: TokenizerRecord | None
    source: Source | None


def to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`: the same for equal manifests."""
    value = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def read(folder: Path | Storage) -> Manifest:
    """The manifest in `folder`. Raises UserError when there is none or it cannot be read."""
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    where = storage.at(NAME)
    try:
        return _typed(where, json.loads(storage.read(NAME).decode("utf-8", "surrogateescape")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where} is no manifest of a dataset ({error!r}). prepare the dataset again."
        ) from error


def _typed(where: str, value: dict[str, Any]) -> Manifest:
    if value.pop("format") != FORMAT:
        raise UserError(f"{where} is not a gristmill manifest. name the directory of a dataset.")
    if (version := value.pop("version")) != VERSION:
        raise UserError(
            f"{where} has format version {version}, this gristmill reads {VERSION}. "
            "use the gristmill that wrote it, or prepare the dataset again."
        )
    source = value.pop("source")
    if source is not None:
        for name in ("inputs", "quarantined"):
            source[name] = tuple((first, second) for first, second in source[name])
    tokenizer = value.pop("tokenizer")
    return Manifest(
        totals=Totals(**value.pop("totals")),
        tokenizer=None if tokenizer is None else TokenizerRecord(**tokenizer),
        source=None if source is None else Source(**source),
        **value,
    )

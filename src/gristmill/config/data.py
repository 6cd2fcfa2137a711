"""The data modules: what `--data NAME` names and `--data.option` sets. Behaviour is in `data/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TokenPolicy = Literal["auto", "none"] | int


class DataModule:
    """Base of the data modules; a class of your own is named as `--data module:Class`.

    A class of your own also defines `datasets(self, tokenizer_dir: Path) -> Datasets`
    (see `gristmill.data.modules`).
    """


@dataclass(kw_only=True)
class RawText(DataModule):
    """Options of every module that starts from raw text, prepared into a cache beside it."""

    train_data_path: str
    """Folder or file of training text."""
    val_data_path: str | None = None
    """Folder or file of validation text; unset: `val_fraction` of the training text."""
    val_fraction: float = 0.01
    """Share of the text held out for validation, chosen by content."""
    bos: TokenPolicy = "auto"
    """Id put before each document: auto (the module's custom), none, or an id."""
    eos: TokenPolicy = "auto"
    """Id put after each document: auto (the module's custom), none, or an id."""
    seed: int = 42
    """Seed of the sample order and of the shuffle inside prepared units."""
    num_workers: int | Literal["auto"] = "auto"
    """Processes that prepare the text; auto: one per core."""
    cache_dir: str | None = None
    """Where prepared datasets go; unset: `.gristmill` beside the text, else the user's cache."""


@dataclass(kw_only=True)
class TextFiles(RawText):
    """A folder of text files, each one document. BOS before each, as LitGPT's module has it."""

    pattern: str = "**/*.txt"
    """Which files of a folder are taken, as a glob."""
    separator: str | None = None
    """Text that parts a file into documents; unset: a file is one document."""


@dataclass(kw_only=True)
class Jsonl(RawText):
    """JSON lines (.jsonl, .jsonl.gz, .jsonl.zst): one document per line."""

    pattern: str = "**/*.jsonl*"
    """Which files of a folder are taken, as a glob."""
    text_field: str = "text"
    """Name of the field that holds the text."""


@dataclass(kw_only=True)
class LitData(DataModule):
    """A prepared dataset: gristmill's own or litdata token chunks, read where they are."""

    data_path: str
    """Directory of the dataset, or of its `train` and `val` folders. `path` is accepted too."""
    split_names: tuple[str, str] | None = None
    """Names of the training and validation folders; unset: `train` and `val` if they are there."""
    seed: int = 42
    """Seed of the sample order."""

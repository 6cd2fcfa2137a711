"""The data modules: what `--data NAME` names and `--data.option` sets. Behaviour is in `data/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

TokenPolicy = Literal["auto", "none"] | int


class DataModule:
    """Base of the data modules; a class of your own is named as `--data module:Class`.

    A class of your own also defines `datasets(self, tokenizer_dir: Path) -> Datasets`
    (see `gristmill.data.modules`).
    """


@dataclass(kw_only=True)
class RawText(DataModule):
    """Options of every module that starts from raw text, prepared into a cache beside it."""

    layout: ClassVar[str] = "textfiles"
    """The layout of `gristmill prepare` that the text is read with."""

    train_data_path: str
    """Folder, file or URL of training text. `data_path` is accepted too."""
    pattern: str = "**/*"
    """Which files of a folder are taken, as a glob."""
    val_data_path: str | None = None
    """Folder or file of validation text; unset: `val_fraction` of the training text."""
    val_fraction: float = 0.01
    """Share of the text held out for validation, chosen by content. `val_split_fraction` is
    accepted too."""
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

    layout: ClassVar[str] = "textfiles"

    pattern: str = "**/*.txt"
    """Which files of a folder are taken, as a glob."""
    separator: str | None = None
    """Text that parts a file into documents; unset: a file is one document."""


@dataclass(kw_only=True)
class Records(RawText):
    """Options of the modules whose files hold records, one document each."""

    text_field: str = "text"
    """Field that holds the text, nested ones as a.b."""


@dataclass(kw_only=True)
class Jsonl(Records):
    """JSON lines (.jsonl, .jsonl.gz, .jsonl.zst): one document per line."""

    layout: ClassVar[str] = "jsonl"

    pattern: str = "**/*.jsonl*"
    """Which files of a folder are taken, as a glob."""


@dataclass(kw_only=True)
class Parquet(Records):
    """Parquet files: one document per row."""

    layout: ClassVar[str] = "parquet"

    pattern: str = "**/*.parquet"
    """Which files of a folder are taken, as a glob."""


@dataclass(kw_only=True)
class FineWeb(Records):
    """FineWeb or FineWeb-Edu, as their parquet files come. BOS before each document."""

    layout: ClassVar[str] = "fineweb"

    pattern: str = "**/*.parquet"
    """Which files of a folder are taken, as a glob."""


@dataclass(kw_only=True)
class SlimPajama(Records):
    """SlimPajama, as its .jsonl.zst files come, without GitHub. EOS after each document."""

    layout: ClassVar[str] = "slimpajama"

    pattern: str = "**/*.jsonl.zst"
    """Which files of a folder are taken, as a glob."""


@dataclass(kw_only=True)
class StarCoder(Records):
    """StarCoderData, as its parquet files come. EOS after each document."""

    layout: ClassVar[str] = "starcoder"

    pattern: str = "**/*.parquet"
    """Which files of a folder are taken, as a glob."""
    text_field: str = "content"
    """Field that holds the text, nested ones as a.b."""


@dataclass(kw_only=True)
class OpenWebText(Records):
    """OpenWebText, as its parquet files come. EOS after each document, as in LitGPT's module."""

    layout: ClassVar[str] = "openwebtext"

    train_data_path: str = "data/openwebtext"
    """Folder, file or URL of training text. `data_path` is accepted too."""
    pattern: str = "**/*.parquet"
    """Which files of a folder are taken, as a glob."""
    val_fraction: float = 0.0005
    """Share of the text held out for validation, chosen by content. `val_split_fraction` is
    accepted too."""


@dataclass(kw_only=True)
class TinyStories(Records):
    """TinyStories, as its JSON files come. BOS before each story, as in LitGPT's module."""

    layout: ClassVar[str] = "tinystories"

    train_data_path: str = "data/tinystories"
    """Folder, file or URL of training text. `data_path` is accepted too."""
    pattern: str = "**/data*.json"
    """Which files of a folder are taken, as a glob."""
    text_field: str = "story"
    """Field that holds the text, nested ones as a.b."""


@dataclass(kw_only=True)
class LitData(DataModule):
    """A prepared dataset: gristmill's own or litdata token chunks, read where they are."""

    data_path: str
    """Directory or URL of the dataset, or of its `train` and `val` folders. `path` is accepted
    too."""
    val_data_path: str | None = None
    """The same for validation; unset: the `val` folder of `data_path`, if it is there."""
    split_names: tuple[str, str] | None = None
    """Names of the training and validation folders; unset: `train` and `val` if they are there."""
    seed: int = 42
    """Seed of the sample order."""
    cache_dir: str | None = None
    """Where chunks of an object store come to lie; unset: the user's cache."""
    cache_gb: float | Literal["auto"] = "auto"
    """Limit of that cache; auto: twice what is needed, at most most of the free disk."""


@dataclass(kw_only=True)
class RedPajama(DataModule):
    """The sets of RedPajama as `gristmill prepare redpajama` wrote them, in lit-llama's shares."""

    data_path: str = "data/redpajama"
    """Folder of the prepared sets: arxiv, book, … or arxiv_sample, book_sample, …"""
    val_data_path: str | None = None
    """The same for validation; unset: what each set holds out, if anything."""
    seed: int = 42
    """Seed of the sample order."""
    cache_dir: str | None = None
    """Where chunks from object stores come to lie; unset: the user's cache."""
    cache_gb: float | Literal["auto"] = "auto"
    """Limit of that cache; auto: twice what is needed, at most most of the free disk."""


@dataclass(kw_only=True)
class MixtureSource:
    """One corpus of a mixture."""

    path: str
    """Directory or URL of a prepared dataset, or of its `train` and `val` folders."""
    weight: float = 1.0
    """Share of the training tokens, relative to the others'."""
    name: str | None = None
    """What it is called in messages and metrics; unset: the name of its folder."""
    max_epochs: float | None = None
    """Refuse a run that would read it more often than this."""


@dataclass(kw_only=True)
class MixtureStage:
    """Other weights from a point of the run on."""

    from_tokens: float
    """Training tokens after which they hold."""
    weights: dict[str, float]
    """Weight of each source by its name; one that is not named has none."""


@dataclass(kw_only=True)
class Mixture(DataModule):
    """Several prepared datasets, mixed by weights that are shares of the training tokens."""

    sources: list[MixtureSource]
    """The corpora: [{path: …, weight: 7, name: …, max_epochs: …}, …]."""
    stages: list[MixtureStage] = field(default_factory=list)
    """Other weights later on: [{from_tokens: 1e9, weights: {web: 1, books: 3}}, …]."""
    seed: int = 42
    """Seed of the sample order."""
    cache_dir: str | None = None
    """Where chunks from object stores come to lie; unset: the user's cache."""
    cache_gb: float | Literal["auto"] = "auto"
    """Limit of that cache; auto: twice what is needed, at most most of the free disk."""

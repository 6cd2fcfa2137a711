"""Options of the commands that look at data, check it and adopt it. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gristmill.config.sections import Auto


def listed(paths: list[str] | str) -> list[str]:
    """The paths of an option that takes one or several."""
    return [paths] if isinstance(paths, str) else paths


@dataclass(kw_only=True)
class DataStats:
    """Show what datasets hold: tokens, documents, their lengths, rejects, epochs of a run."""

    data_path: list[str] | str = field(default_factory=list)
    """Datasets, or folders of datasets such as train and val; the words after the command."""
    max_tokens: int | None = None
    """Tokens of a planned run: how many epochs of each dataset that is."""
    weights: list[int] | None = None
    """Share of each dataset in the planned run, whole numbers; unset: by its tokens."""
    seq_len: int | None = None
    """Tokens per sample of a planned run: how many samples and steps an epoch has."""
    global_batch_size: int | None = None
    """Samples per step of a planned run."""
    json: bool = False
    """Write one JSON object instead of a page, for scripts."""


@dataclass(kw_only=True)
class DataInspect:
    """Show text as a model sees it: a document, a sample or the batch of a step, with document
    boundaries and special tokens visible."""

    data_path: str | None = None
    """Directory of the dataset; the first word after the command."""
    run: str | None = None
    """Run directory of a training: its data, seed, batch size and sequence length are taken."""
    document: int | None = None
    """Number of a document, from 0, in the order on the disk."""
    sample: int | None = None
    """Number of a sample, from 0, in the order on the disk."""
    step: int | None = None
    """Step of a training, from 1: exactly the samples that it sees."""
    seq_len: int | None = None
    """Tokens per sample, as --train.max_seq_length of the training; unset: the run's."""
    global_batch_size: int | None = None
    """Samples per step, as --train.global_batch_size of the training; unset: the run's."""
    seed: int | None = None
    """Seed of the sample order, as --data.seed of the training; unset: the run's, or 42."""
    row: int | None = None
    """Show only this row of the batch, from 0."""
    max_chars: int | Auto = "auto"
    """Characters shown of each document or sample, 0 for all; auto: 2000, in a batch 300."""
    ids: bool = False
    """Show a token a line, with its place and id, instead of running text."""
    tokenizer_dir: str | None = None
    """Directory of the tokenizer; unset: the one inside the dataset."""


@dataclass(kw_only=True)
class DataVerify:
    """Check datasets: digests and offsets of all chunks, range of ids, index against manifest."""

    data_path: list[str] | str = field(default_factory=list)
    """Datasets, or folders of datasets such as train and val; the words after the command."""
    num_workers: int | Auto = "auto"
    """Chunks that are checked at a time; auto: one per core."""


@dataclass(kw_only=True)
class DataEstimate:
    """Tokenize a small sample of raw text and say how large a dataset the whole will be."""

    layout: str | None = None
    """What the input looks like: a layout's name (`gristmill prepare list`)."""
    input_dir: str | None = None
    """Folder, file or URL of raw text. `source_path` is accepted too."""
    tokenizer_dir: str | None = None
    """Directory (or file) of the tokenizer. `tokenizer_path` is accepted too."""
    output_dir: str | None = None
    """Where the dataset will go: whether its disk has room. Nothing is written."""
    fraction: float = 0.01
    """Share of the text that is read, in pieces spread over all of it."""
    max_bytes: int = 256_000_000
    """Text read at most."""
    pattern: str | None = None
    """Which files are taken, as a glob; unset: the layout's. `match` is accepted too."""
    split: str | None = None
    """Folder of the input that is taken, for corpora that come in splits (train, validation)."""
    text_field: str | None = None
    """Field that holds the text, nested ones as a.b; unset: the layout's."""
    separator: str | None = None
    """Text that parts a file into documents (textfiles); unset: a file is one document."""
    filter: dict[str, Any] | None = None
    """Which records are kept, by field, as for `gristmill prepare`."""
    map: str | None = None
    """Function `module:name` of your own, as for `gristmill prepare`."""
    sample: bool = False
    """The input is the sample of the corpus that its makers publish (redpajama)."""
    bos: Literal["auto", "none"] | int = "auto"
    """Id put before each document: auto (the layout's custom), none, or an id."""
    eos: Literal["auto", "none"] | int = "auto"
    """Id put after each document: auto (the layout's custom), none, or an id."""
    engine: Literal["auto", "tokenizers", "fastokens"] = "auto"
    """Tokenizing engine; auto: the fastest that passes the parity check."""
    num_workers: int | Auto = "auto"
    """Processes that will prepare the text, for the time; auto: one per core."""
    json: bool = False
    """Write one JSON object instead of a page, for scripts."""


@dataclass(kw_only=True)
class DataImport:
    """Adopt token data that another tool wrote: litdata datasets, the folders that each node of a
    cluster wrote, or lit-llama's packed files, a dataset of each set. Nothing is encoded again."""

    input_dir: list[str] | str = field(default_factory=list)
    """What to adopt, one dataset from all of them, or one for each set and side that the names of
    packed files tell apart; the words after the command."""
    output_dir: str | None = None
    """Directory of the dataset; unset: where the data is. Chunks are linked, not copied."""
    copy: bool = False
    """Copy the tokens to output_dir instead of linking them, so that it stands alone."""
    tokenizer_dir: str | None = None
    """Tokenizer that made the tokens: its files travel with the dataset, ids are checked."""

"""What inputs look like, as data: which files, where the text is, what frames it, what is left out.

Where BOS and EOS go when the user leaves them at `auto` (`Layout.first`):

- `bos`: BOS before each document and no EOS; a tokenizer without BOS gets EOS after each instead.
- `eos`: EOS after each document and no BOS; a tokenizer without EOS gets BOS before each instead.
- `both`: EOS after each document, and BOS before it if the tokenizer has one that is not the same
  token (a doubled separator says nothing).

A corpus that has a well-known preparation keeps that one's frame, so that a model trained elsewhere
goes on with what it knows; the others have `both`. A tokenizer with neither token gets neither:
documents stay separable through the chunk headers. Each layout has a page, `docs/corpora/NAME.md`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gristmill.util.errors import UserError


@dataclass(frozen=True)
class Layout:
    """One kind of input."""

    name: str
    description: str
    pattern: str
    """Which files below the input folder are taken, as a glob."""
    records: Literal["text", "records"]
    """Whole text files, or records in the form that the suffix names (see `documents.Format`)."""
    first: Literal["bos", "eos", "both"]
    """What is put between documents by the layout's custom; see the top of this page."""
    text_field: str = "text"
    """Field of a record that holds the text, nested ones as a.b."""
    filters: Mapping[str, Any] = field(default_factory=dict)
    """Which records are kept, in the words of `select.Selection`."""
    parts: Mapping[str, str] | None = None
    """Sets that become a dataset each, with the pattern of their files."""
    sample_parts: Mapping[str, str] | None = None
    """The same for the sample that the corpus's makers publish (`--sample`)."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """What `--split` names, with the pattern of its files."""
    module: str = "LitData"
    """Data module that reads what was prepared."""
    fetch: str = ""
    """Command that downloads the corpus, empty where there is no such corpus."""


_REDPAJAMA_FILES = {
    "arxiv": "arxiv*",
    "book": "book*",
    "c4": "c4-train*",
    "common_crawl": "*.jsonl*",
    "github": "filtered*",
    "stackexchange": "stackexchange*",
    "wikipedia": "wiki*",
}
_REDPAJAMA_SAMPLE = (
    "arxiv",
    "book",
    "c4",
    "cc_2019-30",
    "cc_2020-05",
    "cc_2021-04",
    "cc_2022-05",
    "cc_2023-06",
    "github",
    "stackexchange",
    "wikipedia",
)

_ALL = (
    Layout("textfiles", "text files, one document each", "**/*.txt", "text", "bos"),
    Layout("jsonl", "JSON lines, one document each", "**/*.jsonl*", "records", "both"),
    Layout("json", "JSON arrays of documents, or JSON lines", "**/*.json*", "records", "both"),
    Layout("parquet", "parquet files, one document a row", "**/*.parquet", "records", "both"),
    Layout(
        "huggingface",
        "a Hugging Face dataset saved to disk (Arrow), one document a row",
        "**/*.arrow",
        "records",
        "both",
    ),
    Layout(
        "fineweb",
        "FineWeb and FineWeb-Edu: parquet, `text`",
        "**/*.parquet",
        "records",
        "bos",
        fetch="gristmill download HuggingFaceFW/fineweb --repo_type dataset "
        "--pattern 'sample/10BT/*' --out_dir data/fineweb",
    ),
    Layout(
        "slimpajama",
        "SlimPajama: .jsonl.zst, without its GitHub part",
        "**/*.jsonl.zst",
        "records",
        "eos",
        # StarCoder, its companion, has the same repositories in a better state.
        filters={"meta.redpajama_set_name": {"not_in": ["RedPajamaGithub"]}},
        splits={name: f"{name}/**/*.jsonl.zst" for name in ("train", "validation", "test")},
        fetch="gristmill download cerebras/SlimPajama-627B --repo_type dataset "
        "--out_dir data/slimpajama-raw",
    ),
    Layout(
        "starcoder",
        "StarCoderData: parquet by programming language, `content`",
        "**/*.parquet",
        "records",
        "eos",
        text_field="content",
        # The only split; older scripts name it.
        splits={"train": "**/*.parquet"},
        fetch="gristmill download bigcode/starcoderdata --repo_type dataset "
        "--out_dir data/starcoderdata-raw",
    ),
    Layout(
        "redpajama",
        "RedPajama v1: JSON lines in seven sets, one dataset each",
        "**/*.jsonl*",
        "records",
        "bos",
        parts={name: f"**/{name}/**/{files}" for name, files in _REDPAJAMA_FILES.items()},
        sample_parts={f"{name}_sample": f"**/{name}_sample.jsonl" for name in _REDPAJAMA_SAMPLE},
        module="RedPajama",
        fetch="gristmill download togethercomputer/RedPajama-Data-1T-Sample --repo_type dataset "
        "--out_dir data/RedPajama-Data-1T-Sample",
    ),
    Layout(
        "openwebtext",
        "OpenWebText: parquet, `text`",
        "**/*.parquet",
        "records",
        "eos",
        fetch="gristmill download Skylion007/openwebtext --repo_type dataset "
        "--out_dir data/openwebtext",
    ),
    Layout(
        "tinystories",
        "TinyStories: JSON arrays, `story`",
        "**/data*.json",
        "records",
        "bos",
        text_field="story",
        fetch="gristmill download roneneldan/TinyStories --repo_type dataset "
        "--pattern TinyStories_all_data.tar.gz --out_dir data/tinystories",
    ),
)

LAYOUTS = {layout.name: layout for layout in _ALL}


def names() -> list[str]:
    """The names that `gristmill prepare` knows, in the order they are shown."""
    return list(LAYOUTS)


def get(name: str) -> Layout:
    """The layout called `name`. Raises UserError, with the list, for others."""
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"unknown layout {name!r}{hint}. use one of: {', '.join(LAYOUTS)} "
            "(`gristmill prepare list`)."
        )
    return LAYOUTS[name]


def sets(
    layout: Layout, *, pattern: str | None = None, split: str | None = None, sample: bool = False
) -> dict[str, str]:
    """The datasets that the options mean: name of each (empty: the only one) and its files' glob.

    `pattern` narrows a corpus of several sets to those whose name it is part of, as the scripts of
    this field have it. Raises UserError for an option that the layout has no use for.
    """
    if sample and layout.sample_parts is None:
        having = ", ".join(name for name, other in LAYOUTS.items() if other.sample_parts)
        raise UserError(
            f"--sample is for {having}; {layout.name} has no sample of its own. leave it out.",
            {"--sample": None},
        )
    if split is not None:
        return {"": _split_pattern(layout, pattern, split)}
    parts = layout.sample_parts if sample else layout.parts
    if parts is None:
        return {"": pattern or layout.pattern}
    chosen = {name: glob for name, glob in parts.items() if (pattern or "") in name}
    if not chosen:
        raise UserError(
            f"--pattern {pattern!r} names no set of {layout.name}. "
            f"give a part of one of: {', '.join(parts)}; or leave it out for all."
        )
    return chosen


def _split_pattern(layout: Layout, pattern: str | None, split: str) -> str:
    if split not in layout.splits:
        there = ", ".join(layout.splits)
        advice = f"use one of: {there}." if there else "leave it out, or choose files by --pattern."
        raise UserError(f"--split {split!r} is not known to {layout.name}. {advice}")
    if pattern is not None:
        raise UserError(
            f"--split {split} and --pattern {pattern} both choose files. leave one out.",
            {"--split": None},
        )
    return layout.splits[split]


@dataclass(frozen=True)
class Frame:
    """The ids put before and after each document, None for nothing."""

    bos_id: int | None
    eos_id: int | None


def frame(
    layout: Layout,
    *,
    bos: str | int,
    eos: str | int,
    bos_id: int | None,
    eos_id: int | None,
    num_token_ids: int,
) -> Frame:
    """The frame that options and tokenizer give; see the top of this page for `auto`.

    `bos_id` and `eos_id` are the tokenizer's. Raises UserError for an id it does not have.
    """
    for option, value in (("bos", bos), ("eos", eos)):
        if isinstance(value, int) and not 0 <= value < num_token_ids:
            raise UserError(
                f"--{option} {value} is no id of the tokenizer (it has 0 to {num_token_ids - 1}). "
                f"use auto, none or an id in that range."
            )
    before, after = _chosen(bos, bos_id), _chosen(eos, eos_id)
    if layout.first == "bos" and eos == "auto" and before is not None:
        return Frame(before, None)
    if layout.first == "eos" and bos == "auto" and after is not None:
        return Frame(None, after)
    doubled = bos == "auto" and before == after
    return Frame(None if doubled else before, after)


def _chosen(option: str | int, automatic: int | None) -> int | None:
    if isinstance(option, int):
        return option
    return None if option == "none" else automatic

"""The data of `gristmill finetune`: what `--data NAME` names and `--data.option` sets.

Behaviour is in `finetune/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


class TuningData:
    """Base of the data modules of finetuning; one of your own is named as `--data module:Class`.

    A class of your own has the options of `Records` (derive from it), and defines
    `records(self) -> tuple[list, list]`: records to train on and held-out ones, each a dictionary
    as a line of a file of `JSON` has it.
    """


@dataclass(kw_only=True)
class Records(TuningData):
    """Options of every module: records of prompts and answers, or of whole chats."""

    mask_prompt: bool = True
    """Learn the answers only; false: prompts too."""
    prompt_style: str = "auto"
    """How a prompt becomes text: chat (the model's chat template), alpaca, flan, longform, default
    (as it stands) or another style of LitGPT's, or a Jinja template of yours, text or .jinja file;
    auto: chat, else alpaca."""
    val_fraction: float = 0.05
    """Share of the records held out, chosen by content. `val_split_fraction` is accepted too."""
    include_multiturn_conversations: bool = True
    """Whole chats; false: only the first prompt and answer of each."""
    on_error: Literal["fail", "skip"] = "fail"
    """A record that cannot be used ends the command, or is left out."""
    seed: int = 42
    """Seed of the order of the records and of what is held out."""


@dataclass(kw_only=True)
class JSON(Records):
    """Records of your own: {"instruction", "input", "output"} or {"messages": [...]} each."""

    json_path: str
    """A .json, .jsonl (.gz, .zst) or .parquet file, or a folder with train.* and val.*."""
    val_path: str | None = None
    """File of held-out records; unset: `val_fraction` of json_path."""


@dataclass(kw_only=True)
class HubRecords(Records):
    """Options of the sets that come from the Hugging Face hub."""

    repo: ClassVar[str]
    """Where the set is on the hub."""
    train_files: ClassVar[tuple[str, ...]] = ("*.json", "*.jsonl", "*.parquet")
    """Patterns of the files with records to train on."""
    val_files: ClassVar[tuple[str, ...]] = ()
    """Patterns of the files with held-out records; empty: a share of the others."""

    download_dir: str | None = None
    """Folder of the files; unset: data/<name>, or data/<organisation>--<name> of another repo_id.
    What is there is not fetched again."""
    repo_id: str | None = None
    """Another repository on the hub with the same records."""


@dataclass(kw_only=True)
class Alpaca(HubRecords):
    """Alpaca, cleaned: 51,760 instructions."""

    repo: ClassVar[str] = "yahma/alpaca-cleaned"

    val_fraction: float = 0.03865
    """Share of the records held out, chosen by content. `val_split_fraction` is accepted too."""


@dataclass(kw_only=True)
class Alpaca2k(HubRecords):
    """2,000 instructions of Alpaca, for trying things out."""

    repo: ClassVar[str] = "mhenrichsen/alpaca_2k_test"


@dataclass(kw_only=True)
class AlpacaGPT4(HubRecords):
    """Alpaca's instructions, answered by GPT-4."""

    repo: ClassVar[str] = "vicgalle/alpaca-gpt4"

    val_fraction: float = 0.03847
    """Share of the records held out, chosen by content. `val_split_fraction` is accepted too."""


@dataclass(kw_only=True)
class Dolly(HubRecords):
    """Dolly: 15,011 instructions, some with a context, written by people."""

    repo: ClassVar[str] = "databricks/databricks-dolly-15k"

    val_fraction: float = 0.1
    """Share of the records held out, chosen by content. `val_split_fraction` is accepted too."""


@dataclass(kw_only=True)
class LIMA(HubRecords):
    """LIMA: 1,030 chosen chats; its repository asks for a token (HF_TOKEN)."""

    repo: ClassVar[str] = "GAIR/lima"
    train_files: ClassVar[tuple[str, ...]] = ("train.jsonl", "*train*")

    val_fraction: float = 0.1
    """Share of the records held out, chosen by content. `val_split_fraction` is accepted too."""


@dataclass(kw_only=True)
class FLAN(HubRecords):
    """FLAN: tasks phrased as instructions, in subsets."""

    repo: ClassVar[str] = "Muennighoff/flan"
    train_files: ClassVar[tuple[str, ...]] = ("train/{subset}_train.jsonl",)
    val_files: ClassVar[tuple[str, ...]] = ("test/{subset}_test.jsonl",)

    subsets: str | None = None
    """Names of subsets, as aeslc_10templates,cb_10templates; unset: all, which is a lot."""


@dataclass(kw_only=True)
class Deita(HubRecords):
    """Deita: 10,000 chats, chosen by quality."""

    repo: ClassVar[str] = "HuggingFaceH4/deita-10k-v0-sft"
    train_files: ClassVar[tuple[str, ...]] = ("*train_sft*",)
    val_files: ClassVar[tuple[str, ...]] = ("*test_sft*",)


@dataclass(kw_only=True)
class LongForm(HubRecords):
    """LongForm: instructions whose answers are long texts."""

    repo: ClassVar[str] = "akoksal/LongForm"
    train_files: ClassVar[tuple[str, ...]] = ("*train*",)
    val_files: ClassVar[tuple[str, ...]] = ("*val*",)

"""The data of `gristmill finetune`: what `--data NAME` names. Behaviour is in `finetune/`."""

from __future__ import annotations

from dataclasses import dataclass


class TuningData:
    """Base of the data modules of finetuning; one of your own is named as `--data module:Class`."""


@dataclass(kw_only=True)
class JSON(TuningData):
    """Records of your own: Alpaca-style (instruction, input, output) or chats (messages)."""

    json_path: str
    """A .json or .jsonl file, or a folder with train and val files."""

"""What inputs look like, as data: which files, how they part into documents, what frames these.

Where BOS and EOS go when the user leaves them at `auto`:

- `textfiles`: BOS before each document and no EOS, as LitGPT's TextFiles has it. A tokenizer
  without BOS gets EOS after each document instead.
- other layouts: EOS after each document, and BOS before it if the tokenizer has one that is not
  the same token (a doubled separator says nothing).

A tokenizer with neither gets neither: documents stay separable through the chunk headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gristmill.util.errors import UserError


@dataclass(frozen=True)
class Layout:
    """One kind of input. `records` says how a file parts into documents."""

    name: str
    description: str
    pattern: str
    records: Literal["text", "jsonl"]
    first: Literal["bos", "eos"]
    """The token that the layout's custom puts between documents."""


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("textfiles", "text files, one document each", "**/*.txt", "text", "bos"),
        Layout("jsonl", "JSON lines, one document each", "**/*.jsonl*", "jsonl", "eos"),
    )
}


def names() -> list[str]:
    """The names that `gristmill prepare` knows, in the order they are shown."""
    return list(LAYOUTS)


def get(name: str) -> Layout:
    """The layout called `name`. Raises UserError, with the list, for others."""
    if name not in LAYOUTS:
        raise UserError(
            f"unknown layout {name!r}. use one of: {', '.join(LAYOUTS)} (`gristmill prepare list`)."
        )
    return LAYOUTS[name]


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
    before = _chosen(bos, bos_id)
    if layout.first == "bos":
        return Frame(before, _chosen(eos, eos_id if before is None else None))
    after = _chosen(eos, eos_id)
    doubled = bos == "auto" and before == after
    return Frame(None if doubled else before, after)


def _chosen(option: str | int, automatic: int | None) -> int | None:
    if isinstance(option, int):
        return option
    return None if option == "none" else automatic

"""Options of commands that tutorials of other tools have, and that no stage here needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class MergeFiles:
    """One dataset from the folders that the nodes of a cluster wrote. What `gristmill prepare`
    wrote is one already, and only linked."""

    source_dir: str | None = None
    """Folder that holds them; the first word after the command."""
    target_dir: str | None = None
    """Directory of the dataset, which must not exist; the second word after the command."""
    tokenizer_dir: str | None = None
    """Tokenizer that made the tokens: its files travel with the dataset, ids are checked."""


@dataclass(kw_only=True)
class Consolidate:
    """One file from a checkpoint that another tool wrote in pieces. No command here needs it."""

    checkpoint_folder: str | None = None
    """The folder with the pieces, such as out/final/lit_model.pth; the first word after the
    command."""
    output_file: str | None = None
    """File to write, which must not exist; unset: the folder's name with .consolidated."""

"""The command `gristmill merge_files`: a step of the Ray guide, which links instead of moving."""

from __future__ import annotations

import os
from pathlib import Path

from gristmill.config.data_commands import DataImport
from gristmill.config.script_commands import MergeFiles
from gristmill.data.store import adopt, manifest
from gristmill.util.errors import RunError, UserError


def merge(cfg: MergeFiles) -> None:
    """Make `target_dir` the dataset of all that is in `source_dir`; nothing moves or is copied.

    A dataset of ours is one already: the target becomes a link to it. Raises UserError for folders
    that hold no data, or a target that is something else.
    """
    if cfg.source_dir is None or cfg.target_dir is None:
        raise UserError(
            "merge_files takes where the folders are and where to put the dataset. "
            "give both: gristmill merge_files --source_dir DIR --target_dir OUT"
        )
    source, target = Path(cfg.source_dir).expanduser(), Path(cfg.target_dir).expanduser()
    if (source / manifest.NAME).is_file():
        _link(source, target)
        return
    adopt.run(
        DataImport(input_dir=str(source), output_dir=str(target), tokenizer_dir=cfg.tokenizer_dir)
    )
    print(f"The chunks stay in {source}: {target} has links to them.")


def _link(source: Path, target: Path) -> None:
    """Make the target lead to the dataset."""
    if not (target.exists() and os.path.samefile(source, target)):
        if target.is_symlink() or (target.exists() and not _is_empty(target)):
            raise UserError(f"{target} is there already. name another --target_dir.")
        try:
            if target.is_dir():
                target.rmdir()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve(), target_is_directory=True)
        except OSError as error:
            raise RunError(
                f"{target} cannot be made ({error.strerror}). use {source} as it is: it is whole."
            ) from error
    print(
        f"{source} is one dataset already, whoever prepared its parts: nothing to merge.\n"
        f"{target} leads to it, so that the next command finds it. Keep {source}."
    )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())

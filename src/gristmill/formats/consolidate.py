"""The command `gristmill consolidate_checkpoint`: a foreign checkpoint in pieces as one file."""

from __future__ import annotations

import os
from pathlib import Path

from gristmill.config.script_commands import Consolidate
from gristmill.formats import litgpt
from gristmill.formats.beside import writing
from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.pickles import METADATA
from gristmill.formats.torch_file import write_torch_file
from gristmill.util.errors import UserError


def consolidate(cfg: Consolidate) -> None:
    """Write the model's tensors as one table that LitGPT and `torch.load` read.

    Optimizer and place in the data are left out. What is whole already is said to be. Raises
    UserError for a folder that holds no checkpoint, and for a file that is there.
    """
    if cfg.checkpoint_folder is None:
        raise UserError(
            "no checkpoint is named. Give its folder: gristmill consolidate_checkpoint "
            "out/final/lit_model.pth"
        )
    folder = Path(cfg.checkpoint_folder).expanduser()
    if not folder.is_dir() or not (folder / METADATA).is_file():
        _say_that_it_is_whole(folder)
        return
    out = Path(cfg.output_file or f"{folder}{litgpt.CONSOLIDATED}").expanduser()
    if out.exists():
        raise UserError(f"{out} is there already. Delete it, or name another file.")
    tensors = litgpt.tensors_in(folder)
    shapes, dtypes = {}, {}
    for name, tensor in tensors.items():
        shapes[name], dtypes[name] = tuple(tensor.shape), tensor.dtype
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with writing(out):
            write_torch_file(part, shapes, dtypes, tensors.__getitem__)
            os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    print(
        f"{out}: {len(tensors):,} tensors, {out.stat().st_size / 1e9:.2f} GB in one file.\n"
        f"No command of gristmill needs it: gristmill chat {folder.parent}"
    )


def _say_that_it_is_whole(folder: Path) -> None:
    """What stands where pieces were looked for, when it is a model that needs no such step."""
    places = [folder, folder.parent] if folder.name == litgpt.WEIGHTS else [folder]
    for place in places:
        if not place.exists():
            continue
        try:
            source = open_model_dir(place)
        except UserError:
            continue
        print(
            f"{source.path} is whole ({source.kind}): there is nothing to consolidate, to rename "
            f"or to convert.\nUse it: gristmill chat {source.path}"
        )
        return
    raise UserError(
        f"{folder} is no checkpoint in pieces (no {METADATA}). Name the folder that holds "
        "them, or the model itself: gristmill inspect DIR says what a directory is."
    )

"""A new directory in the place of an old one: readers may have the old files mapped."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def beside(out: Path, what: str) -> Path:
    """Where a directory is built (`new`) or put aside (`old`)."""
    return out.with_name(f".{out.name}.{what}")


def swap(new: Path, out: Path) -> None:
    """Put a finished directory in the place of an old one."""
    old = beside(out, "old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(out, old)
    # Another process that finds it in this state finishes it: see below.
    with contextlib.suppress(FileNotFoundError):
        os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


def finish_swap(out: Path) -> None:
    """Put `out` back where a swap was killed between its two renames."""
    if not out.exists() and beside(out, "old").exists():
        os.rename(beside(out, "new"), out)
        shutil.rmtree(beside(out, "old"), ignore_errors=True)

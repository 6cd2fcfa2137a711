"""Where things are: model directories by their short names, and the user's cache."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

DOWNLOADS = "checkpoints"


def resolve_model_dir(path: str | os.PathLike[str]) -> Path:
    """The directory or file that `path` means; it need not exist.

    `~` is expanded. A relative path that does not exist, but does under `checkpoints/` (where
    tools of this field keep models), is that one: `EleutherAI/pythia-14m` is enough, and so is
    `pythia-14m` or `checkpoints/pythia-14m` where one organisation's folder has it.
    """
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists():
        return given
    parts = given.parts[given.parts[:1] == (DOWNLOADS,) :]
    downloaded = Path(DOWNLOADS, *parts)
    if parts and downloaded.exists():
        return downloaded
    if len(parts) == 1 and not any(mark in parts[0] for mark in "*?["):
        found = list(Path(DOWNLOADS).glob(f"*/{parts[0]}"))
        if len(found) == 1:
            return found[0]
    return given


def how_to_get(path: str | os.PathLike[str]) -> str:
    """What to do about a model at `path` that is not there: the command that downloads it.

    Only a name that the hub could have (ORG/NAME or NAME, under `checkpoints/` or not) is
    suggested for download, and no path in a folder of this machine.
    """
    parts = Path(path).parts
    name = "/".join(parts[parts[:1] == (DOWNLOADS,) :])
    local = parts[:1] != (DOWNLOADS,) and len(parts) == 2 and Path(parts[0]).is_dir()
    if not local and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return (
            f"Fetch it with `gristmill download {name}`, "
            "or name a model directory, such as out/quickstart/final."
        )
    return "Name a model directory, such as out/quickstart/final."


def user_cache_dir() -> Path:
    """The directory for what may be forgotten: in `XDG_CACHE_HOME` or the system's place for it."""
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "gristmill"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gristmill"
    return Path.home() / ".cache" / "gristmill"

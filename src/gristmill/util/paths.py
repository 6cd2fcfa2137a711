"""Where things are: model directories by their short names, and the user's cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOWNLOADS = "checkpoints"


def resolve_model_dir(path: str | os.PathLike[str]) -> Path:
    """The directory or file that `path` means; it need not exist.

    `~` is expanded. A relative path that does not exist, but does under `checkpoints/` (where
    tools of this field keep models), is that one: `EleutherAI/pythia-14m` is enough.
    """
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists() or given.parts[:1] == (DOWNLOADS,):
        return given
    downloaded = Path(DOWNLOADS) / given
    return downloaded if downloaded.exists() else given


def user_cache_dir() -> Path:
    """The directory for what may be forgotten: in `XDG_CACHE_HOME` or the system's place for it."""
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "gristmill"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gristmill"
    return Path.home() / ".cache" / "gristmill"

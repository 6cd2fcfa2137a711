"""Where things are: model directories by their short names, and the user's cache."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

DOWNLOADS = "checkpoints"
FILES = (".bin", ".ckpt", ".gguf", ".json", ".model", ".pt", ".pth", ".safetensors")
"""How files end; no repository of the hub is meant by such a name."""


def resolve_model_dir(path: str | os.PathLike[str]) -> Path:
    """The directory or file that `path` means; it need not exist.

    `~` is expanded. A relative path that does not exist, but does under `checkpoints/` (where
    tools of this field keep models), is that one: `EleutherAI/pythia-14m` is enough, and so is
    `pythia-14m` or `checkpoints/pythia-14m` where one organisation's folder has it. Other tools'
    `step-00001000.pth` is the checkpoint of that step where it is a directory.
    """
    given = Path(path).expanduser()
    if given.suffix == ".pth" and not given.exists() and given.with_suffix("").is_dir():
        return given.with_suffix("")
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


def download_command(path: str | os.PathLike[str]) -> str | None:
    """The command that downloads what is not at `path`; None for a path the hub has no name for.

    Names of the hub are ORG/NAME or NAME, under `checkpoints/` or not; a folder that is there with
    something else in it is none, nor is a file's name.
    """
    parts = Path(path).parts
    name = "/".join(parts[parts[:1] == (DOWNLOADS,) :])
    local = parts[:1] != (DOWNLOADS,) and len(parts) == 2 and Path(parts[0]).is_dir()
    if local or name.endswith(FILES) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return None
    return f"gristmill download {name}"


def how_to_get(path: str | os.PathLike[str]) -> str:
    """What to do about a model that is not at `path`: the command that downloads it, if any."""
    command = download_command(path)
    if command is None:
        return "Name a model directory, such as out/quickstart/run."
    return f"Fetch it with `{command}`, or name a model directory, such as out/quickstart/run."


def user_cache_dir() -> Path:
    """The directory for what may be forgotten: in `XDG_CACHE_HOME` or the system's place."""
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "gristmill"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gristmill"
    return Path.home() / ".cache" / "gristmill"


def user_state_dir() -> Path:
    """The directory for what commands remember: in `XDG_STATE_HOME` or the system's place."""
    root = os.environ.get("XDG_STATE_HOME")
    if root:
        return Path(root) / "gristmill"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "gristmill"
    return Path.home() / ".local" / "state" / "gristmill"

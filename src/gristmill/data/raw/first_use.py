"""Corpora that a training command names by their name alone: fetched when they are first used."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gristmill.config.commands import Download
from gristmill.data.raw.download import download
from gristmill.data.raw.fetch import STATE
from gristmill.data.raw.layouts import Layout
from gristmill.util.errors import RunError, UserError

_MARK = "first-use"
"""In the state folder while the corpus is not whole."""


def fetch(layout: Layout, path: Path) -> None:
    """Have the layout's corpus at `path`: from the hub unless it is there, archives unpacked.

    Interrupted, the same call goes on. Several processes may ask at once. Raises UserError where
    the network is not to be used, with the command for a machine where it is.
    """
    state = path / STATE
    if path.exists() and not (state / _MARK).exists() and _unpacked(layout, path):
        return
    with alone(state):
        begun = (state / _MARK).exists()
        if begun or not any(item.name != STATE for item in path.iterdir()):
            if is_offline():
                raise UserError(
                    f"there is no {path}, and HF_HUB_OFFLINE is set. name the corpus with "
                    f"--data.train_data_path, or fetch it: {layout.fetch} "
                    f"(docs/corpora/{layout.name}.md has the steps)."
                )
            (state / _MARK).touch()
            print(f"there is no {path}: fetching it once ({layout.fetch})", file=sys.stderr)
            download(replace(_command(layout), out_dir=str(path)))
        for archive in _archives(layout, path):
            _unpack(archive, path)
        (state / _MARK).unlink(missing_ok=True)


def _command(layout: Layout) -> Download:
    """The options of the command that fetches the corpus."""
    words = shlex.split(layout.fetch)[2:]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    return Download(
        repo_id=words[0],
        repo_type="dataset" if options.get("--repo_type") == "dataset" else "model",
        pattern=options.get("--pattern"),
    )


def _archives(layout: Layout, path: Path) -> list[Path]:
    if any(path.glob(layout.pattern)):
        return []
    return sorted(path.glob("*.tar.gz"))


def _unpacked(layout: Layout, path: Path) -> bool:
    return not path.is_dir() or not _archives(layout, path)


def _unpack(archive: Path, path: Path) -> None:
    print(f"unpacking {archive}", file=sys.stderr)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                # Under another name until it is whole: a glob finds what is there.
                if member.isfile():
                    part = member.replace(name=f"{member.name}.part", deep=False)
                    tar.extract(part, path, filter="data")
                    os.replace(path / part.name, path / member.name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RunError(f"{archive} does not unpack ({error}). delete it, and try again.") from None


def is_offline() -> bool:
    """Whether the user has told the hub's tools to stay off the network."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")


@contextlib.contextmanager
def alone(state: Path) -> Iterator[None]:
    """Wait until no other process fetches on first use into the folder, and let none begin."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        handle = (state / f"{_MARK}.lock").open("w")
    except OSError as error:
        raise UserError(f"{state.parent} cannot be written ({error.strerror}).") from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

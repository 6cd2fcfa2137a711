"""The command that installs packages which only some people want."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from pathlib import Path


def install_command(extra: str) -> str:
    """What to type for the packages of an extra of pyproject.toml; it works where it is said.

    In a clone that is the README's command. Elsewhere it names the packages, because no index of
    packages has this one.
    """
    python, clone = Path(sys.executable), _clone()
    pip = python.with_name("pip")
    words = [_shown(pip)] if pip.is_file() else [_shown(python), "-m", "pip"]
    words.append("install")
    if all((clone / name).is_file() for name in ("pyproject.toml", "constraints.txt")):
        where = "." if Path.cwd() == clone else str(clone)
        words += ["-c", _shown(clone / "constraints.txt"), "-e", f"{where}[{extra}]"]
    else:
        words += _packages(extra)
    return shlex.join(words)


def _clone() -> Path:
    """Where the repository is, if this is the code of one."""
    return Path(__file__).resolve().parents[3]


def _shown(path: Path) -> str:
    """The path as people type it who are here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _packages(extra: str) -> list[str]:
    """What the installed package says that the extra needs."""
    found = []
    for line in importlib.metadata.requires("gristmill") or ():
        package, _, condition = line.partition(";")
        if re.search(rf"""extra\s*==\s*["']{extra}["']""", condition):
            found.append(package.strip())
    return found

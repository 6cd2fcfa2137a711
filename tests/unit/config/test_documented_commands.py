"""Every command that a page shows is one that the command line takes."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from gristmill.cli import COMMANDS, _command_name, _listing
from gristmill.config.parse import parse

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "corpora").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]


def commands(page: Path) -> list[list[str]]:
    """The commands in the indented blocks of a page."""
    found = []
    for line in page.read_text().splitlines():
        words = line.strip().removeprefix("$ ").removeprefix("srun ")
        if line.startswith("    ") and words.startswith("gristmill ") and "…" not in words:
            # The prompt of a command may go over several lines.
            closed = words if words.count("'") % 2 == 0 else words + "'"
            found.append(shlex.split(closed, comments=True)[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page):
    listed = commands(page)
    assert listed
    for words in listed:
        name, rest = _command_name(words)
        command = COMMANDS[name]
        if _listing(command, rest) is not None:
            continue
        module, _, attribute = command.config.partition(":")
        config = getattr(importlib.import_module(module), attribute)
        parse(config, rest, prog=f"gristmill {name}", positionals=command.positionals)

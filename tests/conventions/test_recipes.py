"""Every shipped recipe parses into the command whose folder it is in, and says how to run it."""

from __future__ import annotations

import importlib

from gristmill.cli import COMMANDS
from gristmill.config.parse import parse
from gristmill.config.recipes import RECIPES_DIR, names

MAX_LINES = 60


def _config_of(folder: str) -> type:
    module, _, name = COMMANDS[folder].config.partition(":")
    return getattr(importlib.import_module(module), name)


def test_recipes_parse():
    assert RECIPES_DIR.is_dir(), "src/gristmill/recipes is gone"
    for name in names():
        command = _config_of(name.partition("/")[0])
        settings = parse(command, ["--config", name], prog="gristmill", positionals=())
        assert isinstance(settings, command)


def test_recipes_open_with_their_command():
    for name in names():
        lines = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("#"), f"{name} has no opening comment"
        opening = [line for line in lines if line.startswith("#")]
        assert any(f"--config {name}" in line for line in opening), f"{name}: no command to run it"
        assert len(lines) <= MAX_LINES, f"{name}: {len(lines)} lines"

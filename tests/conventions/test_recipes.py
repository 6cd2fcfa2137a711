"""Every shipped recipe parses into the command whose folder it is in, and says how to run it."""

from __future__ import annotations

import importlib

from gristmill.cli import COMMANDS
from gristmill.config.commands import Pretrain
from gristmill.config.parse import parse
from gristmill.config.recipes import RECIPES_DIR, names
from gristmill.models import zoo
from gristmill.models.check import check_config
from gristmill.train.ranges import check_ranges

MAX_LINES = 60


def _config_of(recipe: str) -> type:
    folder, _, rest = recipe.partition("/")
    command = f"finetune {rest.rpartition('/')[2]}" if folder == "finetune" else folder
    module, _, name = COMMANDS[command].config.partition(":")
    return getattr(importlib.import_module(module), name)


def test_recipes_parse():
    assert RECIPES_DIR.is_dir(), "src/gristmill/recipes is gone"
    for name in names():
        command = _config_of(name)
        settings = parse(command, ["--config", name], prog="gristmill", positionals=())
        assert isinstance(settings, command)


def test_recipes_open_with_their_command():
    for name in names():
        lines = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("#"), f"{name} has no opening comment"
        opening = [line for line in lines if line.startswith("#")]
        assert any(f"--config {name}" in line for line in opening), f"{name}: no command to run it"
        assert len(lines) <= MAX_LINES, f"{name}: {len(lines)} lines"


def test_recipes_say_what_hardware_they_want():
    for name in names():
        text = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
        assert "# Hardware: " in text, name


def test_models_of_recipes_can_be_built_and_exported():
    for name in names():
        if not name.startswith("pretrain/"):
            continue
        settings = parse(Pretrain, ["--config", name], prog="gristmill", positionals=())
        check_ranges(settings)
        model = settings.model_config
        if model is None and settings.model_name is not None:
            model = zoo.get(settings.model_name)
        if model is not None:
            check_config(model)
            zoo.family(model.family).to_hf_config(model)
            length = settings.train.max_seq_length
            assert length == "auto" or length <= model.max_seq_length

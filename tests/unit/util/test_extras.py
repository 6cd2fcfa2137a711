"""The command that installs an extra can be typed where it is said."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from gristmill.util import extras
from gristmill.util.extras import install_command

ROOT = Path(__file__).parents[3]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with an environment as `make` lays it out; this process runs from it."""
    for name in ("pyproject.toml", "constraints.txt", ".venv/bin/python", ".venv/bin/pip"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(extras, "_clone", lambda: tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    return tmp_path


def test_the_code_is_in_the_clone():
    assert extras._clone() == ROOT


def test_in_a_clone_it_is_the_command_of_the_readme(clone, monkeypatch):
    monkeypatch.chdir(clone)
    said = install_command("all")
    assert said == ".venv/bin/pip install -c constraints.txt -e '.[all]'"
    assert f"    {said}\n" in (ROOT / "README.md").read_text()


def test_elsewhere_paths_are_whole(clone, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    pip, constraints = clone / ".venv/bin/pip", clone / "constraints.txt"
    said = install_command("serve")
    assert said == f"{pip} install -c {constraints} -e '{clone}[serve]'"
    pip.unlink()
    assert install_command("serve").startswith(f"{clone / '.venv/bin/python'} -m pip install -c ")


def test_without_a_clone_the_packages_are_named(clone, monkeypatch):
    (clone / "constraints.txt").unlink()
    monkeypatch.chdir(clone)
    said = install_command("serve")
    assert said.startswith(".venv/bin/pip install 'fastapi>=")
    assert "'uvicorn>=" in said
    assert "gristmill" not in said


def test_every_extra_that_a_message_names_is_there():
    names = set(importlib.metadata.metadata("gristmill").get_all("Provides-Extra"))
    named = set()
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pip install 'gristmill[" not in text, path
        named |= {part.partition('"')[0] for part in text.split('install_command("')[1:]}
        named |= {part.partition("'")[0] for part in text.split("install_command('")[1:]}
    assert {"serve", "evaluate", "ray"} <= named <= names

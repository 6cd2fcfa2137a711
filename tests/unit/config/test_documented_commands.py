"""Every command that a page shows is one that the command line takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from gristmill.cli import COMMANDS, _command_name, _listing
from gristmill.config.parse import parse
from gristmill.config.scripts import translate

ROOT = Path(__file__).parents[3]
HELP = {"--help", "--data.help", "--optimizer.help"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


INLINE = re.compile(r"`(gristmill [^`]+ -[^`]+)`")
"""A command with options in the running text; one without may stand for the command as such."""


def commands(page: Path) -> list[list[str]]:
    """The commands of a page: in indented and fenced blocks, and in its text."""
    found, fenced = [], False
    for line in page.read_text().replace("\\\n", " ").splitlines():
        words = line.strip().removeprefix("$ ").removeprefix("srun ")
        fenced ^= line.startswith("```")
        is_code = fenced or line.startswith("    ")
        shown = [words] if is_code else INLINE.findall(line.replace("\\|", "|"))
        for text in (text for text in shown if text.startswith("gristmill ") and "…" not in text):
            # The prompt of a command may go over several lines.
            closed = text if text.count("'") % 2 == 0 else text + "'"
            listed = shlex.split(closed, comments=True)[1:]
            ends = [listed.index(mark) for mark in (">", "|", "&&") if mark in listed]
            found.append(listed[: min(ends, default=len(listed))])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in map(translate, commands(page)):
        if set(words) & HELP:
            continue
        name, rest = _command_name([word for word in words if word != "--print_config"])
        command = COMMANDS[name]
        if _listing(command, rest) is not None:
            continue
        for file in (word for word in rest if word.endswith(".yaml") and "/" not in word):
            Path(file).touch()  # one of the reader's own
        module, _, attribute = command.config.partition(":")
        config = getattr(importlib.import_module(module), attribute)
        parse(config, rest, prog=f"gristmill {name}", positionals=command.positionals)


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 100


def listed_in(manifest: Path) -> list[str]:
    """The words after `gristmill` of the command that a manifest starts."""
    spec = yaml.safe_load(manifest.read_text())["spec"]
    if "entrypoint" in spec:
        words = shlex.split(spec["entrypoint"])
    else:
        pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        words = pod["containers"][0]["command"]
    return words[words.index("gristmill") + 1 :]


@pytest.mark.parametrize("name", ["jobset", "rayjob"])
def test_commands_of_a_manifest_are_taken(name):
    words = listed_in(ROOT / "docs" / "kubernetes" / f"{name}.yaml")
    name, rest = _command_name(words)
    command = COMMANDS[name]
    module, _, attribute = command.config.partition(":")
    config = getattr(importlib.import_module(module), attribute)
    assert parse(config, rest, prog="gristmill", positionals=command.positionals).data is not None


def pods(value: object) -> list[dict]:
    """Every pod that a manifest describes."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [pod for item in value.values() for pod in pods(item)]


@pytest.mark.parametrize(("name", "count"), [("jobset", 1), ("rayjob", 2)])
def test_pods_of_a_manifest_share_a_folder_and_have_memory_to_share(name, count):
    manifest = yaml.safe_load((ROOT / "docs" / "kubernetes" / f"{name}.yaml").read_text())
    found = pods(manifest)
    assert len(found) == count
    for pod in found:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            places = {
                mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]
            }
            assert "persistentVolumeClaim" in places["/shared"]
            assert places["/dev/shm"]["emptyDir"]["medium"] == "Memory"

"""What the house rules are checked on: every file of the package, parsed once."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """One Python file: `name` is its place below the root, `module` its dotted name (src only)."""

    path: Path
    name: str
    module: str
    text: str
    tree: ast.Module

    def imports(self) -> Iterator[tuple[int, str]]:
        """Every import anywhere in the file, as (line, absolute dotted name)."""
        package = self.module.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                prefix = [*base, *([node.module] if node.module else [])]
                for alias in node.names:
                    yield node.lineno, ".".join([*prefix, alias.name])


def _read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    dotted = [p for p in parts[1:] if p != "__init__"] if parts[0] == "src" else parts
    name = path.relative_to(ROOT).as_posix()
    return Source(path, name, ".".join(dotted), text, ast.parse(text, filename=name))


def _read_all(folder: str) -> list[Source]:
    return [_read(path) for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def package() -> list[Source]:
    """The files of the package itself."""
    found = _read_all("src")
    assert len(found) > 10, "the package is not where the rules look for it"
    return found


@pytest.fixture(scope="session")
def all_python(package: list[Source]) -> list[Source]:
    return [*package, *_read_all("tests"), *_read_all("benchmarks")]


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[Path]:
    """Every file that belongs to the project, as git lists them (new ones too)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git work tree")
    return [path for line in listed.stdout.splitlines() if (path := root / line).is_file()]

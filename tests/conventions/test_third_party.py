"""Third-party packages: each import is declared, and an optional one has one file that knows it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections import defaultdict

# Import names that differ from the package's name on the index.
IMPORT_NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
# Parts of torch that need an optional package belong to that package.
PARTS_OF = {"torch.utils.tensorboard": "tensorboard"}
# Two uses that share the connection only: tasks that prepare text, and workers that train.
TWICE = {"ray"}
# Never imported by the package, only by its tests and tools.
TOOLS = "test"


def _import_names(requirements: list[str]) -> set[str]:
    names = set()
    for requirement in requirements:
        name = re.match(r"[\w-]+", requirement).group().lower()
        if name != "gristmill":
            names.add(IMPORT_NAMES.get(name, name.replace("-", "_")))
    return names


def _declared(root) -> tuple[set[str], set[str]]:
    """Import names of the required and of the optional packages."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = set().union(*(_import_names(v) for k, v in extras.items() if k != TOOLS))
    return _import_names(project["dependencies"]), optional


def _third_party(source):
    for line, name in source.imports():
        owner = next((own for part, own in PARTS_OF.items() if name.startswith(part)), None)
        top = owner or name.split(".")[0]
        if top != "gristmill" and top not in sys.stdlib_module_names:
            yield line, top


def test_every_import_is_declared(package, root):
    required, optional = _declared(root)
    assert "torch" in required
    assert "yaml" in required
    known = required | optional
    wrong = [
        f"{s.name}:{n} {top}" for s in package for n, top in _third_party(s) if top not in known
    ]
    assert not wrong, "not declared in pyproject.toml (or declared for tests only): " + ", ".join(
        wrong
    )


def test_optional_packages_are_imported_in_one_file(package, root):
    _, optional = _declared(root)
    places = defaultdict(set)
    for source in package:
        for _, top in _third_party(source):
            places[top].add(source.name)
    spread = {
        top: sorted(files)
        for top, files in places.items()
        if top in optional and len(files) > 1 + (top in TWICE)
    }
    assert not spread, f"optional packages imported in more than one file: {spread}"

"""No code comes out of data, and no path of somebody's machine goes into the project."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The error that torch.load(weights_only=True) raises, imported by its name.
HARMLESS = {"pickle.UnpicklingError"}
# Reads names as stand-ins from a list of its own, and nothing else.
ALLOW_LISTING = ("src/gristmill/formats/pickles.py", "pickle.Unpickler")
# The one reader of foreign pickles: it finds the names of its list and no others.
ALLOWED = {("src/gristmill/formats/pickles.py", "pickle.Unpickler")}
# Homes of people and of build machines; written in pieces so that this file passes its own test.
MACHINE_PATHS = re.compile(
    "|".join([r"(?<![\w.])/(?:root|home|Users)" + r"/\w", "/opt/" + "wheels"])
)
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ".json", ".jsonl", ""}


def _unsafe_calls(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: k.value for k in node.keywords}
        safe = options.get("weights_only")
        if ast.unparse(node.func) == "torch.load" and not (
            isinstance(safe, ast.Constant) and safe.value is True
        ):
            found.append((node.lineno, "torch.load without weights_only=True"))
        if ast.unparse(node.func) in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}:
            found.append((node.lineno, ast.unparse(node.func)))
        if "trust_remote_code" in options:
            found.append((node.lineno, "trust_remote_code"))
    return found


def test_nothing_executes_what_it_reads(package):
    wrong = [f"{s.name}:{line} {what}" for s in package for line, what in _unsafe_calls(s.tree)]
    for source in package:
        for line, name in source.imports():
            allowed = name in HARMLESS or (source.name, name) in ALLOWED
            if name.split(".")[0] in PICKLES and not allowed:
                wrong.append(f"{source.name}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_paths_of_a_machine(tracked: list[Path], root: Path):
    wrong = []
    for path in tracked:
        if path.suffix in TEXT and path.name != "LICENSE":
            for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
                if found := MACHINE_PATHS.search(line):
                    wrong.append(f"{path.relative_to(root)}:{number} {found.group()}")
    assert not wrong, "\n".join(wrong)


def test_unsafe_calls_are_seen():
    code = (
        "torch.load(p)\ntorch.load(p, weights_only=True)\nf(trust_remote_code=x)\neval(s)\nm.eval()"
    )
    assert [line for line, _ in _unsafe_calls(ast.parse(code))] == [1, 3, 4]
    assert MACHINE_PATHS.search("see /" + "home/me/x")
    assert not MACHINE_PATHS.search("https://a.b/c/" + "home/x and /tmp/x")

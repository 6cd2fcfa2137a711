"""A file fits in 500 lines and a function on a screen of 60; tables of sizes are exempt.

And names of test files are unique.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
TABLES = "src/gristmill/models/zoo/"


def _long_functions(tree: ast.Module) -> list[tuple[str, int, int]]:
    return [
        (node.name, node.lineno, lines)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def test_files_fit(all_python):
    lines = {s.name: s.text.count("\n") for s in all_python if not s.name.startswith(TABLES)}
    long = {name: n for name, n in lines.items() if n > MAX_FILE_LINES}
    assert not long, f"more than {MAX_FILE_LINES} lines: {long}"


def test_functions_fit_on_a_screen(all_python):
    long = [
        f"{source.name}:{line} {name}: {lines} lines"
        for source in all_python
        if not source.name.startswith(TABLES)
        for name, line, lines in _long_functions(source.tree)
    ]
    assert not long, f"more than {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


def test_length_is_counted():
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert _long_functions(ast.parse("def f():\n" + body)) == [("f", 1, MAX_FUNCTION_LINES + 1)]
    assert _long_functions(ast.parse("def f():\n    pass\n")) == []


def test_names_of_test_files_are_unique():
    """pytest imports those of a folder that is no package by their bare name."""
    files = Path(__file__).parents[1].rglob("test_*.py")
    names = Counter(f.name for f in files if not (f.parent / "__init__.py").exists())
    twice = [name for name, count in names.items() if count > 1]
    assert not twice, f"two files of one name: {', '.join(twice)}"

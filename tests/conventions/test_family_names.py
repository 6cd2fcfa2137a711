"""No family or model name outside `models/zoo/`, recipes and tests: behaviour is never a name.

Names in docstrings and comments are free, and so are other tools' names (LitGPT, llama.cpp).
"""

from __future__ import annotations

import ast
import re

FAMILIES = re.compile(
    r"(?<![a-z])(tiny|open|code|smol)?[-_]?"
    r"(llama(?!s|\.cpp|-gguf)|pythia|gpt[-_]?neox|gemma|phi[-_]?\d|qwen|mistral|mixtral|olmo|falcon|smollm"
    r"|stablelm|deepseek|danube|starcoder2|nemotron)",
    re.IGNORECASE,
)
FREE = (
    "src/gristmill/models/zoo/",
    "src/gristmill/recipes/",
    "src/gristmill/config/scripts.py",  # files of other tools, by their names
)
# Exceptions, each with its reason.
GGUF_WORDS = "a word that the GGUF format itself has for a kind of tokenizer"
ALLOWED = {
    **{
        (f"src/gristmill/tokenizer/{file}.py", name): GGUF_WORDS
        for file, names in {
            "gguf_splits": (
                "llama",
                "smollm",
                "qwen",
                "-qwen",
                "falcon",
                "olmo",
                "phi-2",
                "deepseek",
            ),
            "gguf_vocabulary": ("llama", "Llama"),
        }.items()
        for name in names
    },
    ("src/gristmill/config/model.py", "llama"): "the default table of a custom architecture",
}


def _docstrings(tree: ast.Module) -> set[int]:
    """Ids of string statements: docstrings of modules, classes, functions and fields."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def _words(tree: ast.Module):
    """(line, word) of every identifier and every string that is not documentation."""
    documentation = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def named(tree: ast.Module) -> list[tuple[int, str]]:
    return [(line, m.group()) for line, word in _words(tree) for m in FAMILIES.finditer(word)]


def test_families_are_named_in_the_zoo_only(package):
    wrong = [
        f"{source.name}:{line} {name}"
        for source in package
        if not source.name.startswith(FREE)
        for line, name in named(source.tree)
        if (source.name, name) not in ALLOWED
    ]
    assert not wrong, "family names outside models/zoo:\n" + "\n".join(wrong)


def test_names_are_seen():
    code = '"""llama in a docstring"""\nif "llama" in name: apply_phi3()\nx = "llamas, redpajama"'
    assert [name for _, name in named(ast.parse(code))] == ["llama", "phi3"]

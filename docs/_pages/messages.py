"""The page of all messages: what the code says when a command ends badly, gathered from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "gristmill"
CODES = {"UserError": 2, "MissingPackage": 2, "RunError": 1}
AREAS = {
    "cli": "The command line",
    "config": "Options and configuration files",
    "tokenizer": "Tokenizers",
    "data": "Preparing and reading data",
    "train": "Training",
    "finetune": "Finetuning",
    "optim": "Training",
    "track": "Trackers",
    "models": "Models",
    "formats": "Model directories and files",
    "checkpoint": "Checkpoints",
    "parallel": "Several devices",
    "launch": "Several devices",
    "infer": "Using a model",
    "infer/serve": "Serving",
    "evaluate": "Evaluating",
}
"""Folders of the package, and what people call what they do."""


def template(node: ast.expr) -> str | None:
    """The text of a message with `…` for each value; None where it is not written out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = template(node.left), template(node.right)
        return "".join("…" if side is None else side for side in sides)
    return None


def shown(text: str) -> str:
    """The text on one line, values that follow each other as one."""
    return re.sub(r"…([.:=]?…)+", "…", " ".join(text.split()))


def messages(package: Path = PACKAGE) -> list[tuple[str, int, str]]:
    """(file below the package, exit code, message) of every error that the code raises."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            code = CODES.get(node.func.id)
            text = template(node.args[0]) if code and node.args else None
            # What is mostly values says nothing to somebody who looks for it.
            if code and text and len(re.findall(r"[a-zA-Z]{2,}", text)) >= 3:
                file = path.relative_to(package).as_posix()
                found.append((file, code, shown(text)))
    return found


def strings(package: Path = PACKAGE) -> str:
    """Every text in the code, one a line, `…` for values: what a message may be quoted from."""
    lines = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                text = template(node)
                if text:
                    lines.append(shown(text))
    return "\n".join(lines)


def area_of(file: str) -> str:
    """The part of the work that a file of the package belongs to; the longest folder counts."""
    fit = [folder for folder in AREAS if file.startswith((f"{folder}/", f"{folder}.py"))]
    return AREAS[max(fit, key=len)] if fit else "Others"


def page() -> str:
    """The page: an area each, messages in alphabetical order."""
    areas: dict[str, set[tuple[str, int]]] = {}
    for file, code, text in messages():
        areas.setdefault(area_of(file), set()).add((text, code))
    parts = [
        "# Every message",
        "What a command says when it ends badly, gathered from the code; `…` stands for a name, a "
        "number or a path. Messages have one form: *what is wrong. what to do.* The number is the "
        "exit code: 2 is a mistake that you can correct, 1 a failure of the machine, the disk or "
        "the data. [Troubleshooting](../troubleshooting.md) says more of those that people meet.",
    ]
    order = dict.fromkeys([*AREAS.values(), "Others"])
    for area in order:
        if area in areas:
            rows = sorted(areas[area], key=lambda row: row[0].lstrip("…-. ").lower())
            lines = [f"| {_cell(text)} | {code} |" for text, code in rows]
            parts += [f"## {area}", "\n".join(["| message | code |", "|---|---|", *lines])]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """A message in a table: signs that mean something to Markdown as themselves."""
    return re.sub(r"([\\`*_\[\]{}|#])", r"\\\1", text).replace("<", "&lt;")


def pages() -> dict[str, str]:
    """The one page of this file, by its place on the site."""
    return {"reference/messages.md": page()}

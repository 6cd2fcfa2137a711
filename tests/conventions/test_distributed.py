"""`torch.distributed` is named only where processes are started, joined or talk to each other."""

from __future__ import annotations

import ast

PLACES = (
    "src/gristmill/parallel/",
    "src/gristmill/checkpoint/",
    "src/gristmill/launch/",
    "src/gristmill/train/run.py",
)


def _mentions(tree: ast.Module) -> list[int]:
    """Lines that reach torch.distributed by attribute (imports are seen by the caller)."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]


def test_torch_distributed_stays_in_its_places(package):
    wrong = []
    for source in package:
        if source.name.startswith(PLACES):
            continue
        lines = _mentions(source.tree)
        lines += [
            line
            for line, name in source.imports()
            if name == "torch.distributed" or name.startswith("torch.distributed.")
        ]
        wrong += [f"{source.name}:{line}" for line in sorted(lines)]
    assert not wrong, "torch.distributed is named in " + ", ".join(wrong)


def test_mentions_are_seen():
    assert _mentions(ast.parse("import torch\nx = torch.distributed.get_rank()")) == [2]
    assert _mentions(ast.parse("torch.nn.Linear")) == []

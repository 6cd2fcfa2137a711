"""Names of tensors in files against names of parameters, as a table that reads both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weight:
    """A line of a family's table: a tensor of its files, the parameters in it, and how they lie.

    `{i}` stands for the block and `{e}` for the expert; a tensor with `{e}` is there once for each
    expert, which a parameter of ours has stacked. `layout` is a row of `formats/layouts.py`.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "same"


@dataclass(frozen=True)
class Conversion:
    """Tensors of a file that together hold parameters of the model, and how they lie."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: str = "same"


def conversions(weights: Iterable[Weight], parameters: Shapes) -> list[Conversion]:
    """The table written out for a model's parameters; lines that it has nothing for are left out.

    Raises KeyError for a parameter that no line names: then the architecture has no place for it.
    """
    lines = {name: weight for weight in weights for name in weight.ours}
    out: dict[Conversion, None] = {}
    for name, shape in parameters.items():
        layer = re.search(r"\.(\d+)\.", name)
        index = layer.group(1) if layer else ""
        weight = lines[name.replace(f".{index}.", ".{i}.", 1) if layer else name]
        theirs = weight.theirs.replace("{i}", index)
        count = shape[0] if "{e}" in theirs else 1
        conversion = Conversion(
            tuple(theirs.replace("{e}", str(expert)) for expert in range(count)),
            tuple(ours.replace("{i}", index) for ours in weight.ours),
            weight.layout,
        )
        out[conversion] = None
    return list(out)


def layer_weights(theirs: str, ours: str, names: Mapping[str, str], **layouts: str) -> list[Weight]:
    """Lines for weight and bias of several modules: their name -> ours, behind two prefixes.

    `layouts` gives the layout of a module of ours by its last name.
    """
    return [
        Weight(
            f"{theirs}{name}.{kind}",
            (f"{ours}{target}.{kind}",),
            layouts.get(target.rpartition(".")[2], "same") if kind == "weight" else "same",
        )
        for name, target in names.items()
        for kind in ("weight", "bias")
    ]

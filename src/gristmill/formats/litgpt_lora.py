"""LitGPT's low-rank adapters that are not merged: `lit_model.pth.lora`, with the base elsewhere.

For a matrix there are `lora_A` [r, in] and `lora_B` [out, r]; of the fused query, key and value
those that have an adapter lie one after the other in both. `hyperparameters.yaml` names the base
and the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from gristmill.formats.adapted import Change, LowRank, OpenBase, adapted
from gristmill.formats.pickles import PeekEntry, open_file
from gristmill.formats.source import AGAIN, ModelDir
from gristmill.models.counts import parameter_shapes
from gristmill.models.zoo import litgpt_weights as table
from gristmill.models.zoo.weights import conversions
from gristmill.util.errors import UserError

WEIGHTS = "lit_model.pth.lora"
MERGED = "lit_model.pth"
SETTINGS = "hyperparameters.yaml"
FUSED = ("attn.attn.", "attn.qkv.")
"""The fused projection in older files, and now."""


def find(place: Path, open_base: OpenBase) -> ModelDir | None:
    """The model of LitGPT's adapter and of its base; None where there is none, or it is merged.

    Raises UserError when the base is not here, or a file is damaged.
    """
    file = next((f for f in (place / WEIGHTS, place / "final" / WEIGHTS) if f.is_file()), None)
    if place.name == WEIGHTS and place.is_file():
        file = place
    if file is None or (place != file and (file.parent / MERGED).exists()):
        return None
    settings = _settings(file.parent / SETTINGS)
    base = open_base(str(settings["checkpoint_dir"]), file.parent / SETTINGS)
    entries = {
        table.unwrapped(name).replace(*FUSED): entry
        for name, entry in open_file(file, ("model",)).items()
    }
    changes = _changes(file, base, entries, settings)
    return adapted(file.parent, base, changes, "litgpt", files=dict.fromkeys(changes, file))


def _settings(file: Path) -> dict[str, Any]:
    """What was typed: the base, rank, alpha, and which matrices."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        settings["lora_r"] = int(settings["lora_r"])
        settings["scale"] = float(settings["lora_alpha"]) / settings["lora_r"]
        settings["checkpoint_dir"]
    except (OSError, yaml.YAMLError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}, which says what the adapter beside it is for, is missing or damaged "
            f"({reason}). {AGAIN}"
        ) from None
    return dict(settings)


def _changes(
    file: Path, base: ModelDir, entries: dict[str, PeekEntry], settings: dict[str, Any]
) -> dict[str, Change]:
    shapes = parameter_shapes(base.config)
    lines = {c.theirs[0]: c for c in conversions(table.weights(base.config), shapes)}
    changes: dict[str, Change] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if part != "lora_A":
            continue
        line, other = lines.get(f"{module}.weight"), entries.get(f"{module}.lora_B")
        if line is None or other is None or line.layout not in ("same", "blocks"):
            raise UserError(
                f"{file}: the adapter of {module} has no place in {base.path}. Name the model that "
                f"it was trained for as checkpoint_dir in {file.parent / SETTINGS}."
            )
        chosen = [True] * len(line.ours)
        if len(line.ours) == 3:
            chosen = [bool(settings.get(f"lora_{m}")) for m in ("query", "key", "value")]
        names = [ours for ours, has in zip(line.ours, chosen, strict=True) if has]
        rows = [shapes[ours][0] for ours in names]
        for index, ours in enumerate(names):
            start = sum(rows[:index])
            place = _Place(entry, other, index, len(names), start, rows[index], settings["scale"])
            changes[ours] = place
    return changes


@dataclass(frozen=True)
class _Place:
    """Where in the tensors of a file the adapter of one of our matrices is."""

    a: PeekEntry
    b: PeekEntry
    index: int
    count: int
    start: int
    rows: int
    scale: float

    def __call__(self, weight: Tensor) -> Tensor:
        """The changed matrix."""
        a, b = self.a.read(), self.b.read()
        rank = a.shape[0] // self.count
        a = a[self.index * rank : (self.index + 1) * rank]
        b = b[self.start : self.start + self.rows]
        if a.shape[1] != weight.shape[1] or b.shape != (weight.shape[0], rank):
            raise UserError(
                f"{self.a.file}: an adapter of {list(b.shape)} by {list(a.shape)} is for a matrix "
                f"{list(weight.shape)}. Name the model that it was trained for as checkpoint_dir "
                f"in {self.a.file.parent / SETTINGS}."
            )
        return LowRank(a, b, self.scale)(weight)

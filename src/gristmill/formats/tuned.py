"""Checkpoints of a run that trains an adapter: what is trained alone, and where the base is.

`weights/` has our names: `layers.0.attn.q.lora_A.default.weight` is PEFT's module inside ours.
`adapter.json` says what it means and where the base is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gristmill.config.model import AdaptionPrompt
from gristmill.formats.adapted import Change, Factors, LowRank, OpenBase, adapted, is_prompt
from gristmill.formats.safetensors_io import open_tensors, weight_files
from gristmill.formats.source import AGAIN, Entry, ModelDir, Tensors
from gristmill.models.counts import parameter_shapes
from gristmill.util.errors import UserError

FILE = "adapter.json"
PARTS = {
    ".lora_A.default.weight": "a",
    ".lora_B.default.weight": "b",
    ".lora_magnitude_vector.default.weight": "magnitude",
}
"""Ends of the names of an adapter's parameters in a model that is trained."""
INSIDE = ".base_layer."
"""Between a module's name and its own parameters, where an adapter is around it."""


def describe(base: str | Path, settings: Mapping[str, Any]) -> str:
    """The text of `adapter.json`: `settings` are scale (LoRA), or length and num_layers."""
    return json.dumps({"base": str(base), **settings}, indent=2) + "\n"


def plain_name(name: str) -> str | None:
    """The decoder's own name of a parameter of a model with adapters; None for an adapter's."""
    if any(name.endswith(end) for end in PARTS) or is_prompt(name):
        return None
    return name.replace(INSIDE, ".")


def adapter_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Our name of each matrix with an adapter -> part of the adapter -> name of its parameter."""
    out: dict[str, dict[str, str]] = {}
    for name in names:
        for end, part in PARTS.items():
            if name.endswith(end):
                out.setdefault(f"{name.removesuffix(end)}.weight", {})[part] = name
    return out


def factors(weights: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The adapters among the parameters of a model, by our names of the matrices."""
    return {
        name: Factors(**{part: weights[key].float() for part, key in parts.items()})
        for name, parts in adapter_parts(weights).items()
    }


def with_factors(
    path: Path, base: ModelDir, adapters: Mapping[str, Factors], scale: float
) -> ModelDir:
    """The model of a base and adapters that are at hand."""
    changes: dict[str, Change] = {
        name: LowRank(f.a, f.b, scale, f.magnitude) for name, f in adapters.items()
    }
    return adapted(path, base, changes, "peft", files=dict.fromkeys(changes, path))


def find(place: Path, open_base: OpenBase) -> ModelDir | None:
    """The model of a checkpoint with an adapter and of its base; None where there is none.

    Raises UserError when the base is not here, or the checkpoint damaged.
    """
    file = place / FILE
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        named = str(settings["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}). {AGAIN}") from None
    base, files = open_base(named, file), open_tensors(weight_files(place / "weights"))
    if "num_layers" in settings:
        return _prompts(place, base, files, settings)
    changes: dict[str, Change] = {
        name: partial(_apply, files, parts, float(settings["scale"]))
        for name, parts in adapter_parts(files).items()
    }
    where = {name: files.file_of(parts["a"]) for name, parts in adapter_parts(files).items()}
    return adapted(place, base, changes, "peft", files=where)


def _apply(files: Tensors, parts: Mapping[str, str], scale: float, weight: Tensor) -> Tensor:
    read = {part: files[key] for part, key in parts.items()}
    return LowRank(read["a"], read["b"], scale, read.get("magnitude"))(weight)


def _prompts(place: Path, base: ModelDir, files: Tensors, settings: Mapping[str, Any]) -> ModelDir:
    prompt = AdaptionPrompt(
        length=settings["length"],
        num_layers=settings["num_layers"],
        projected=settings["projected"],
    )
    config = replace(base.config, adaption_prompt=prompt)
    added = {
        name: Entry(files.file_of(name), partial(files.__getitem__, name))
        for name in parameter_shapes(config)
        if is_prompt(name)
    }
    return adapted(place, base, {}, "peft", files={}, config=config, added=added)

"""A model that is another one with changes: each parameter is read, changed and handed on.

    base ─ parameter by parameter ─ changed where an adapter says so ─▶ a model like any other

The names are ours, so that the base may be of any format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.formats.source import Entry, ModelDir, Tensors

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file of settings."""
Json = dict[str, Any]
Change = Callable[[Tensor], Tensor]
"""From a parameter of the base, in fp32, to that of the adapted model."""
OpenBase = Callable[[str, Path], ModelDir]
"""From the base that an adapter names, and the file that names it, to what is there."""


@dataclass(frozen=True)
class LowRank:
    """What is added to a matrix W [out, in], and how long its rows are after that.

    W + scale * b @ a (LoRA, arXiv:2106.09685), then with a magnitude m [out] each row is scaled to
    the length m (DoRA, arXiv:2402.09353).
    """

    a: Tensor
    """[r, in]."""
    b: Tensor
    """[out, r]."""
    scale: float
    magnitude: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """The changed matrix."""
        changed: Tensor = weight + (self.b.to(weight) @ self.a.to(weight)) * self.scale
        if self.magnitude is None:
            return changed
        lengths = torch.linalg.vector_norm(changed, dim=1)
        scaled: Tensor = changed * (self.magnitude.to(weight) / lengths).unsqueeze(1)
        return scaled


def adapted(
    path: Path,
    base: ModelDir,
    changes: Mapping[str, Change],
    kind: Literal["peft", "litgpt"],
    *,
    files: Mapping[str, Path],
    config: ModelConfig | None = None,
    added: Mapping[str, Entry] | None = None,
) -> ModelDir:
    """The model that `base` and `changes`, by parameter, make together.

    files: where what changes a parameter lies, for messages. `config` and `added` are of an adapter
    that brings parameters of its own. What is changed is read as fp32.
    """

    def open_tensors() -> Tensors:
        parameters = base.parameters()
        names = {name: c.theirs[0] for c in base.conversions() for name in c.ours}
        entries = {}
        for name, theirs in names.items():
            change = changes.get(name)
            if change is None:
                file = parameters.files.file_of(theirs)
                entries[name] = Entry(file, partial(parameters.__getitem__, name))
            else:
                read = partial(_changed, parameters, name, change)
                entries[name] = Entry(files[name], read)
        return Tensors(entries | dict(added or {}))

    return ModelDir(path, config or base.config, kind, open_tensors, base=base)


def _changed(parameters: Mapping[str, Tensor], name: str, change: Change) -> Tensor:
    return change(parameters[name].float())


@dataclass(frozen=True)
class Factors:
    """A trained adapter of one of our matrices [out, in]."""

    a: Tensor
    """[r, in]."""
    b: Tensor
    """[out, r]."""
    magnitude: Tensor | None = None
    """[out], where rows are scaled to these lengths (DoRA)."""


@dataclass(frozen=True)
class AdapterFiles:
    """What `adapter_model.safetensors` and `adapter_config.json` hold."""

    tensors: dict[str, Tensor]
    settings: Json


def is_prompt(parameter: str) -> bool:
    """Whether a parameter is one of an adaption prompt's."""
    return ".prompt." in parameter

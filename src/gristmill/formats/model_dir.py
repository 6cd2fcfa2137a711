"""Any directory with a model: what it is, its configuration, its weights into our decoder.

Known are Hugging Face directories (`config.json`, safetensors or `.bin`), our checkpoints
(`step-00001000/` with `config.json` and `weights/`), and run directories, which stand for their
`final/` or else their newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.formats import fused
from gristmill.formats.safetensors_io import AGAIN, stream, weight_files
from gristmill.models import zoo
from gristmill.models.counts import Shapes, parameter_shapes
from gristmill.models.decoder import Decoder
from gristmill.util.errors import UserError
from gristmill.util.paths import resolve_model_dir

MARKER = "gristmill"
CONFIG_VERSION = 1
Put = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class ModelDir:
    """A model directory that was found: its configuration, and where its weights lie."""

    path: Path
    config: ModelConfig
    is_checkpoint: bool

    def names(self) -> dict[str, tuple[str, ...]]:
        """Tensor name in the files -> names of the parameters that it holds."""
        parameters = parameter_shapes(self.config)
        if self.is_checkpoint:
            return {name: (name,) for name in parameters}
        return zoo.family(self.config.family).weight_names(parameters)

    def files(self) -> list[Path]:
        """The files with the weights."""
        return weight_files(self.path / "weights" if self.is_checkpoint else self.path)


def open_model_dir(path: str | Path) -> ModelDir:
    """What `path` is, without reading weights. Raises UserError when it is no model."""
    directory = _locate(resolve_model_dir(path))
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). {AGAIN}") from None
    try:
        is_checkpoint = isinstance(raw.get(MARKER), int)
        config = _own_config(raw) if is_checkpoint else zoo.family_of(raw).from_hf_config(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return ModelDir(directory, config, is_checkpoint)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model at `path`. Raises UserError when there is none."""
    return open_model_dir(path).config


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The decoder with the weights at `path`, in evaluation mode.

    Weights stream from the files to the device in `dtype` (unset: fp32), one tensor at a time.
    Raises UserError naming file and tensor when something is missing, cut off or does not fit.
    """
    with torch.device("meta"):
        model = Decoder(read_config(path))
    model.to(dtype or torch.float32).to_empty(device=device)
    load_weights(model, path)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path, *, put: Put | None = None) -> None:
    """Fill the parameters of `model` with the weights at `path`, whatever their dtype and device.

    `put(parameter, full_value)` stores a value; a sharded model passes one that keeps its own part.
    Raises UserError naming file and tensor when something is missing, cut off or does not fit.
    """
    source = open_model_dir(path)
    parameters = dict(model.named_parameters())
    shapes = parameter_shapes(source.config)
    _check_fit(source, shapes, parameters)
    names = source.names()
    missing = dict.fromkeys(names)
    with torch.no_grad():
        for file, theirs, tensor in stream(source.files()):
            if theirs not in names:
                _check_superfluous(source, file, theirs)
                continue
            for name, value in _parts(source, file, theirs, tensor, names[theirs], shapes):
                if put is None:
                    parameters[name].copy_(value)
                else:
                    put(parameters[name], value)
            missing.pop(theirs, None)
    if missing:
        raise UserError(
            f"{source.path}: {len(missing)} of {len(names)} tensors are missing, "
            f"the first is {next(iter(missing))}. {AGAIN}"
        )


def _locate(path: Path) -> Path:
    """The directory with the `config.json` that `path` means."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}. Name a model directory, such as out/quickstart/final.")
    if (path / "config.json").is_file():
        if (path / "weights").is_dir() and not (path / "checkpoint.json").is_file():
            raise UserError(f"{path} is an unfinished checkpoint. Use the one before it.")
        return path
    if (path / "final" / "config.json").is_file():
        return path / "final"
    steps = sorted(path.glob("step-*/checkpoint.json"), key=lambda p: _step(p.parent))
    if steps:
        return steps[-1].parent
    raise UserError(
        f"{path} is no model directory (no config.json, no final/, no finished step-*/). "
        "Name a model directory, such as out/quickstart/final."
    )


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _own_config(raw: dict[str, Any]) -> ModelConfig:
    """The configuration in one of our checkpoints."""
    version = raw.pop(MARKER)
    if version > CONFIG_VERSION:
        raise UserError(f"format version {version} is newer than this gristmill. Update gristmill.")
    return zoo.config_from_dict(raw)


def _check_fit(source: ModelDir, shapes: Shapes, parameters: dict[str, nn.Parameter]) -> None:
    """UserError when the weights belong to a model of another shape."""
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in [*wanted, *shapes]:
        ours, theirs = wanted.get(name), shapes.get(name)
        if ours != theirs:
            words = [f"{list(s)}" if s is not None else "absent" for s in (theirs, ours)]
            raise UserError(
                f"The weights in {source.path} do not fit the model: {name} is {words[0]} there "
                f"and {words[1]} in the model. Use the model that the weights were made for."
            )


def _check_superfluous(source: ModelDir, file: Path, theirs: str) -> None:
    """UserError for a tensor that the model has no place for; tables and tied heads may stay."""
    if not source.is_checkpoint:
        family = zoo.family(source.config.family)
        head = next(w.theirs for w in family.weights if w.ours == ("head.weight",))
        if family.is_dropped(theirs) or (source.config.tie_embeddings and theirs == head):
            return
    raise UserError(
        f"{file}: tensor {theirs} has no place in the model that {source.path / 'config.json'} "
        "describes. Use the config.json that belongs to these weights."
    )


def _parts(
    source: ModelDir, file: Path, theirs: str, tensor: Tensor, ours: tuple[str, ...], shapes: Shapes
) -> list[tuple[str, Tensor]]:
    """(parameter name, value) of each parameter in one tensor of a file, shapes checked."""
    expected = shapes[ours[0]]
    if len(ours) > 1:
        expected = (fused.rows(source.config), *expected[1:])
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"{file}: tensor {theirs} is {list(tensor.shape)}, but config.json makes it "
            f"{list(expected)}. Use the config.json that belongs to these weights."
        )
    if len(ours) == 1:
        return [(ours[0], tensor)]
    return list(zip(ours, fused.split(tensor, source.config), strict=True))

"""Any directory or file with a model: what it is, its configuration, its weights into our decoder.

Known are our checkpoints (`step-00001000/` with `config.json` and `weights/`), Hugging Face
directories (`config.json`, safetensors or `.bin`), LitGPT's and lit-llama's checkpoints, GGUF
files, adapters of PEFT (which stand for their base with them), and run directories, which stand for
their `final/` or else their newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.formats import gguf, litgpt, litgpt_lora, peft, tuned
from gristmill.formats.safetensors_io import open_tensors, weight_files
from gristmill.formats.source import AGAIN, ModelDir
from gristmill.models import zoo
from gristmill.models.counts import Shapes, parameter_shapes
from gristmill.models.decoder import Decoder
from gristmill.util.errors import UserError
from gristmill.util.paths import how_to_get, resolve_model_dir

MARKER = "gristmill"
CONFIG_VERSION = 1
Put = Callable[[Tensor, Tensor], None]


def open_model_dir(
    path: str | Path, model_name: str | None = None, *, base: str | Path | None = None
) -> ModelDir:
    """What `path` is, without reading weights. Raises UserError when it is no model.

    `model_name` is the architecture of weights that come without their configuration; `base` the
    model that an adapter is for, instead of the one that it names.
    """
    found = resolve_model_dir(path)
    if not found.exists():
        raise UserError(f"{found} does not exist. {how_to_get(path)}")
    place = _locate(found)
    found_here = (
        _find_adapter(place, base)
        or litgpt.find(place, model_name)
        or gguf.find(place)
        or _find(place)
    )
    if found_here is not None:
        return found_here
    what = "no model file" if found.is_file() else "no model directory"
    raise UserError(
        f"{found} is {what} (no config.json, no lit_model.pth, no *.gguf, no final/, no finished "
        "step-*/). Name a model directory, such as out/quickstart/run."
    )


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
    source = open_model_dir(path)
    with torch.device("meta"):
        model = Decoder(source.config)
    model.to(dtype or torch.float32).to_empty(device=device)
    _fill(model, source, None)
    return model.eval()


def load_weights(
    model: nn.Module | Mapping[str, nn.Parameter], path: str | Path, *, put: Put | None = None
) -> None:
    """Fill the parameters of `model` with the weights at `path`, whatever their dtype and device.

    Of a decoder with more in it than one, the decoder's own parameters by their names there.
    `put(parameter, full_value)` stores a value; a sharded model passes one that keeps its own part.
    Raises UserError naming file and tensor when something is missing, cut off or does not fit.
    """
    _fill(model, open_model_dir(path), put)


def _fill(model: nn.Module | Mapping[str, nn.Parameter], source: ModelDir, put: Put | None) -> None:
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    parameters = dict(named)
    _check_fit(source, parameter_shapes(source.config), parameters)
    with torch.no_grad():
        for name, value in source.parameters().items():
            if put is None:
                parameters[name].copy_(value)
            else:
                put(parameters[name], value)


def _find_adapter(place: Path, base: str | Path | None) -> ModelDir | None:
    """An adapter with its base: PEFT's, LitGPT's, or a checkpoint of ours that holds one."""

    def open_base(named: str, file: Path) -> ModelDir:
        beside = file.parent / named
        if base is not None:
            path = resolve_model_dir(base)
        elif not Path(named).is_absolute() and beside.exists():
            path = beside
        else:
            path = resolve_model_dir(named)
        if not path.exists():
            raise UserError(
                f"{place} is an adapter for the model {named}, which is not here. "
                f"{how_to_get(named)} Where the model is elsewhere, say so in {file}."
            )
        return open_model_dir(path)

    for find in (peft.find, tuned.find, litgpt_lora.find):
        found = find(place, open_base)
        if found is not None:
            return found
    return None


def _find(place: Path) -> ModelDir | None:
    """One of our checkpoints or a Hugging Face directory, None where there is no `config.json`."""
    file = place / "config.json"
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). {AGAIN}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} is damaged (it is no table of settings). {AGAIN}")
    try:
        if isinstance(raw.get(MARKER), int):
            return _own_checkpoint(place, raw)
        family = zoo.family_of(raw)
        config = family.from_hf_config(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a value of a wrong kind ({error}). {AGAIN}") from error
    return ModelDir(
        place,
        config,
        "huggingface",
        lambda: open_tensors(weight_files(place)).renamed(family.rename),
        family.weight_table(config),
        lambda name: family.is_dropped(name, config),
    )


def _own_checkpoint(place: Path, raw: dict[str, Any]) -> ModelDir:
    version = raw.pop(MARKER)
    if version > CONFIG_VERSION:
        raise UserError(f"format version {version} is newer than this gristmill. Update gristmill.")
    config = zoo.config_from_dict(raw)
    return ModelDir(
        place, config, "checkpoint", lambda: open_tensors(weight_files(place / "weights"))
    )


def _locate(path: Path) -> Path:
    """The directory or file with a model that `path` means: of a run its end, or newest part."""
    if not path.is_dir():
        return path
    if (path / "config.json").is_file():
        if (path / "weights").is_dir() and not (path / "checkpoint.json").is_file():
            raise UserError(f"{path} is an unfinished checkpoint. Use the one before it.")
        return path
    if any((path / "final" / name).is_file() for name in ("config.json", peft.CONFIG)):
        return path / "final"
    steps = sorted(path.glob("step-*/checkpoint.json"), key=lambda p: _step(p.parent))
    return steps[-1].parent if steps else path


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


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

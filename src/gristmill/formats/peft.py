"""Adapters in PEFT's layout: found with their base, and written.

`adapter_config.json` names the base and the numbers, `adapter_model.safetensors` has tensors for
modules of the Hugging Face model. What they mean is in `peft_lora.py` and `peft_prompts.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from gristmill.formats import peft_lora, peft_prompts
from gristmill.formats.adapted import ADAPTER_CONFIG, AdapterFiles, Json, OpenBase
from gristmill.formats.safetensors_io import open_tensors, write_file
from gristmill.formats.source import AGAIN, ModelDir, Tensors
from gristmill.models import zoo
from gristmill.util.errors import UserError

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


def find(place: Path, open_base: OpenBase) -> ModelDir | None:
    """The model of the adapter in a directory and of its base; None where there is no adapter.

    Raises UserError when the base is not here, or when the adapter does what is not known.
    """
    if not (place / CONFIG).is_file():
        return None
    settings = read_settings(place)
    base = _base(place, settings, open_base)
    kind = settings.get("peft_type")
    if kind == "LORA":
        return peft_lora.open_adapted(place, settings, _tensors(place), base)
    if kind in ("ADAPTION_PROMPT", peft_prompts.OWN_KIND):
        return peft_prompts.open_adapted(place, settings, _tensors(place), base)
    raise UserError(
        f"{place} is an adapter of the kind {kind}, which is not supported (supported: LORA, "
        "ADAPTION_PROMPT). Merge it into its base with the tool that made it."
    )


def read_settings(place: Path) -> Json:
    """The table in `adapter_config.json`. Raises UserError when it is damaged."""
    file = place / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). {AGAIN}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file} is damaged (it is no table of settings). {AGAIN}")
    return settings


def _base(place: Path, settings: Json, open_base: OpenBase) -> ModelDir:
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(
            f"{place / CONFIG} names no base_model_name_or_path. Put in the directory of the model "
            "that the adapter was trained for."
        )
    base = open_base(named, place / CONFIG)
    return replace(base, config=zoo.with_family(base.config))


def _tensors(place: Path) -> Tensors:
    for name in (WEIGHTS, PICKLED):
        if (place / name).is_file():
            return open_tensors([place / name]).renamed(
                lambda key: key.removeprefix(peft_lora.PREFIX)
            )
    raise UserError(f"{place} has a {CONFIG} and no {WEIGHTS}. {AGAIN}")


def write(directory: Path, files: AdapterFiles) -> None:
    """Write `adapter_model.safetensors`, in fp32, and `adapter_config.json` to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(files.tensors.items())}
    write_file(directory / WEIGHTS, shapes, torch.float32, files.tensors.__getitem__)
    text = json.dumps(files.settings, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")

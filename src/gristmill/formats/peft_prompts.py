"""Adaption prompts (LLaMA-Adapter, arXiv:2303.16199) in PEFT's layout, read and written.

A module of the Hugging Face model has `adaption_prompt` [1, n, d] and `adaption_gate` [1], which
are `models/prompt.py`'s. For architectures that PEFT gives none the layout is the same, under a
kind of our own and our own names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from gristmill.config.model import AdaptionPrompt, ModelConfig
from gristmill.formats.adapted import ADAPTER_CONFIG, AdapterFiles, Json, adapted
from gristmill.formats.peft_lora import PREFIX
from gristmill.formats.source import AGAIN, Entry, ModelDir, Tensors
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.util.errors import UserError

OWN_KIND = "GRISTMILL_ADAPTION_PROMPT"
"""`peft_type` of adaption prompts that PEFT does not have."""


def open_adapted(place: Path, settings: Json, files: Tensors, base: ModelDir) -> ModelDir:
    """The model of adaption prompts in `files` and of their base."""
    config = base.config
    table = zoo.family(config.family).adaption
    own = settings["peft_type"] == OWN_KIND
    if table is None and not own:
        raise UserError(
            f"{place} has adaption prompts for {base.path}, whose architecture PEFT gives none. "
            f"Check base_model_name_or_path in {place / ADAPTER_CONFIG}."
        )
    try:
        length, layers = int(settings["adapter_len"]), int(settings["adapter_layers"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{place / ADAPTER_CONFIG} has no adapter_len or adapter_layers. {AGAIN}"
        ) from None
    projected = settings.get("projected", True) if own else table is None or table.projected
    prompt = AdaptionPrompt(length=length, num_layers=layers, projected=bool(projected))
    config = replace(config, adaption_prompt=prompt)
    names, shapes = _prompt_names(config, own), parameter_shapes(config)
    added = {}
    for ours, name in names.items():
        if name not in files:
            raise UserError(f"{place} lacks the tensor {name}. {AGAIN}")
        read = partial(_shaped, files, name, shapes[ours])
        added[ours] = Entry(files.file_of(name), read)
    return adapted(place, base, {}, "peft", files={}, config=config, added=added)


def _prompt_names(config: ModelConfig, own: bool) -> dict[str, str]:
    """Our name of each parameter of adaption prompts -> the name in files."""
    out, table = {}, zoo.family(config.family).adaption
    kinds = {"vectors": "adaption_prompt", "gate": "adaption_gate"}
    for layer, has_prompt in enumerate(config.prompt_layers):
        for ours, theirs in kinds.items() if has_prompt else ():
            name = f"layers.{layer}.attn.prompt.{ours}"
            if own:
                out[name] = name
            else:
                assert table is not None, "PEFT knows the architecture"
                out[name] = f"{table.module.replace('{i}', str(layer))}.{theirs}"
    return out


def _shaped(files: Tensors, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = files[name]
    if tensor.numel() != math.prod(shape):
        raise UserError(
            f"{files.file_of(name)}: {name} is {list(tensor.shape)}, and the base makes it "
            f"{list(shape)}. Name the model that it was trained for as base_model_name_or_path."
        )
    return tensor.reshape(shape)


def prompt_files(config: ModelConfig, prompts: Mapping[str, Tensor], *, base: str) -> AdapterFiles:
    """The adaption prompts of a model, by our names: for PEFT, or, where it has none, for us."""
    prompt, table = config.adaption_prompt, zoo.family(config.family).adaption
    assert prompt is not None, "the model has no adaption prompts"
    own = peft_lacks_prompts(config) is not None
    tensors = {}
    for ours, theirs in _prompt_names(config, own).items():
        tensor = prompts[ours]
        if own:
            tensors[theirs] = tensor
        else:  # PEFT has a batch of one
            tensors[PREFIX + theirs] = tensor.unsqueeze(0) if tensor.dim() > 1 else tensor
    settings: Json = {
        "peft_type": OWN_KIND if own else "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "adapter_len": prompt.length,
        "adapter_layers": prompt.num_layers,
    }
    if own:
        settings["projected"] = prompt.projected
    elif table is not None:
        settings["target_modules"] = table.module.rpartition(".")[2]
    return AdapterFiles(tensors, settings)


def peft_lacks_prompts(config: ModelConfig) -> str | None:
    """Why PEFT cannot compute adaption prompts for a model; None where it can."""
    family = zoo.family(config.family)
    if family.adaption is None:
        return f"PEFT has no adaption prompts for {family.architecture}."
    if config.head_dim is not None:
        return "PEFT's adaption prompts need heads that are hidden_size / num_heads wide."
    if config.attention_out_bias and family.adaption.projected:
        return "PEFT's adaption prompts would add the bias of the output projection twice."
    return None

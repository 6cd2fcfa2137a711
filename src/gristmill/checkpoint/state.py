"""The state of a run as flat tables of tensors, named by parameter.

Weights:    `layers.0.attn.q.weight`
Optimizer:  `layers.0.attn.q.weight.exp_avg`, `layers.0.attn.q.weight.step`

Hyperparameters (learning rate, betas, decay) are not state: the configuration has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def model_state(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, not copied. A shared tensor appears once.

    With `trained_only` just the parameters that are trained.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert isinstance(tensor, Tensor), f"{name} is a {type(tensor).__name__}, not a tensor"
        if trained_only and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>.<key>`, not copied; empty before the first step."""
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for key, value in optimizer.state.get(parameter, {}).items():
                # One value that is not a tensor ruins a safetensors file without an error.
                assert isinstance(value, Tensor), f"{name}.{key} is a {type(value).__name__}"
                assert "." not in key, f"{key} would not be told from the parameter's name"
                state[f"{name}.{key}"] = value
    return state


def allocate_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, TensorStorageMetadata],
) -> dict[str, Tensor]:
    """Room for a saved optimizer state, put in place of the optimizer's present one.

    Tensors shaped like their parameter are laid out (device, shards) like it; single numbers are
    where the optimizer's own would be. Raises KeyError for a parameter the optimizer lacks.
    """
    names = {name: p for name, p in model.named_parameters()}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state: dict[str, Tensor] = {}
    optimizer.state.clear()
    for full_name, entry in saved.items():
        name, key = full_name.rsplit(".", 1)
        parameter = names[name]
        group = groups[id(parameter)]
        dtype = entry.properties.dtype
        if entry.size == parameter.shape:
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            # Fused and capturable kernels read the step count on the device.
            on_device = group.get("fused") or group.get("capturable")
            device = parameter.device if on_device else torch.device("cpu")
            value = torch.zeros(entry.size, dtype=dtype, device=device)
        optimizer.state[parameter][key] = value
        state[full_name] = value
    return state

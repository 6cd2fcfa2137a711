"""The gradients of all processes as one: their norm, clipping, and when they are exchanged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gristmill.parallel.sums import reduced


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def total_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, each number of the model once; the same on all ranks.

    Called once a step, after the last backward pass, which it completes: gradients of small
    parameters that are not cut are summed. Of each part the squares are summed over the ranks that
    hold the other parts, and over no others. Nothing waits for the host.
    """
    _complete(model)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
    parts: dict[tuple[DeviceMesh, ...], list[Tensor]] = {}
    for gradient in gradients:
        parts.setdefault(_cut_over(gradient), []).append(local(gradient))
    norms = [torch.nn.utils.get_total_norm(part, foreach=True) for part in parts.values()]
    squares = torch.stack([norm.float() for norm in norms]).square()
    axes = {axis: None for cut in parts for axis in cut}
    for axis in axes:
        here = torch.tensor([axis in cut for cut in parts], device=squares.device)
        summed = torch.where(here, squares, 0.0)
        dist.all_reduce(summed, group=axis.get_group())
        squares = torch.where(here, summed, squares)
    return squares.sum().sqrt()


def _complete(model: nn.Module) -> None:
    """Sum the gradients of modules that every rank has whole and has seen a part for.

    They say so by `summed_over`: the axes along which the parts lie. One message for each axis.
    """
    parts: dict[DeviceMesh, list[Tensor]] = {}
    for module in model.modules():
        for axis in getattr(module, "summed_over", ()):
            gradients = (p.grad for p in module.parameters(recurse=False))
            parts.setdefault(axis, []).extend(local(g) for g in gradients if g is not None)
    for axis, gradients in parts.items():
        if gradients:
            whole = reduced(torch.cat([g.flatten() for g in gradients]), axis)
            sums = whole.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [s.view_as(g) for s, g in zip(sums, gradients)])


def _cut_over(gradient: Tensor) -> tuple[DeviceMesh, ...]:
    """The axes along which ranks hold other parts of a gradient."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    names = mesh.mesh_dim_names or ()
    assert not any(p.is_partial() for p in gradient.placements), "a gradient is not summed up"
    return tuple(
        mesh if mesh.ndim == 1 else mesh[name]
        for name, placement in zip(names, gradient.placements)
        if not placement.is_replicate()
    )


@torch.no_grad()
def clip(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients down in place, so that their `norm` is `max_norm` at most."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)


def accumulate(model: nn.Module, *, last: bool) -> None:
    """Say, before a micro-step, whether it is the `last` one of its step.

    Copies of a model (replicate) add up their gradients after the last one only.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_all_reduce(last)

"""Weights, gradients and moments cut over processes (ZeRO, arXiv:1910.02054; FSDP2)."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from gristmill.parallel.mesh import Mesh


def shard(model: nn.Module, mesh: Mesh) -> None:
    """Cut every parameter of a decoder in place; each block is put together when it is used.

    Parameter names stay. Gradients are summed over processes, not averaged: the loss of each is
    its sum over targets, divided by the number of all targets.
    """
    grid = mesh.fsdp
    if grid is None:
        return
    for block in model.layers:
        fully_shard(block, mesh=grid)
    # An input embedding of its own is used at the beginning only; the rest is root: a tied
    # embedding is also the head.
    if not model.config.tie_embeddings:
        fully_shard(model.embed, mesh=grid)
        model.embed.set_unshard_in_backward(False)
    fully_shard(model, mesh=grid)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo cannot multiply while it sums.
            module.set_force_sum_reduction_for_comms(True)

"""Weights, gradients and moments cut over processes (ZeRO, arXiv:1910.02054; FSDP2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gristmill.parallel.mesh import Mesh


def shard(model: nn.Module, mesh: Mesh, precision: str) -> None:
    """Cut the parameters of a decoder in place; a block is put together when it is used.

    Parameter names stay. Gradients are summed over processes, not averaged: the loss of each is
    its sum over targets, divided by the number of all targets. In bf16-mixed what autocast would
    make bf16 is sent as bf16: half as much, the same numbers, and no copy of the whole model that
    autocast keeps for the backward pass. Gradients are summed in fp32. The few numbers of a block
    that autocast leaves in fp32 stay whole on every process; see `gradients.total_norm`.
    """
    grid = mesh.fsdp
    if grid is None:
        return
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in model.layers:
        whole = {p for module in _in_fp32(block) for p in module.parameters(recurse=False)}
        for module in _in_fp32(block):
            module.summed_over = (*getattr(module, "summed_over", ()), mesh.tokens)
        fully_shard(block, mesh=grid, mp_policy=policy, ignored_params=whole)
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


def _in_fp32(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that autocast leaves alone: norms, and the choice of experts."""
    return [
        module
        for name, module in block.named_modules()
        if name.endswith(("norm", ".router")) or hasattr(module, "selection_bias")
    ]

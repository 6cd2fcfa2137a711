"""Sums over processes inside a forward or backward pass, which torch.compile can see."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def reduced(x: Tensor, axis: DeviceMesh, how: str = "sum") -> Tensor:
    """The sum (or `max`) of x over the ranks of an axis; no gradient."""
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), how, axis))


class SumValue(torch.autograd.Function):
    """The sum over processes, of which each made a part; a part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        """See `reduced`."""
        return reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """What reads the sum is the same on every process, and so is this gradient."""
        return grad, None


class SumGradient(torch.autograd.Function):
    """x itself, which every process has and makes something else of: its gradient is a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: DeviceMesh) -> Tensor:
        """The same numbers."""
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all processes."""
        return reduced(grad, ctx.axis), None

"""Muon for the matrices of a model and AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# A quintic that takes singular values from (0, 1] to about 1, fastest for the small ones
# (https://kellerjordan.github.io/posts/muon/).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STACK_NUMBERS = 2**24
"""Numbers of matrices of one shape that are taken together: small ones alone leave a device idle,
and all at once would need their size several times over."""


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for the matrices (arXiv:2502.16982), fused AdamW for the rest.

    One object to its users: `param_groups` holds the groups of both, `state` the tensors of both
    (`momentum_buffer`; `exp_avg`, `exp_avg_sq`, `step`). Matrices are parameters [out, in] or
    stacks of them [n, out, in]. Like torch's fused optimizers it divides gradients by `grad_scale`
    and changes nothing where `found_inf` is 1, without waiting for the device; both are tensors
    that the training loop sets, or None.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: torch.optim.AdamW,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr: str,
    ) -> None:
        """Groups of `matrices` have `weight_decay`; `others` is the optimizer of all else."""
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        defaults |= {"adjust_lr": adjust_lr, "fused": bool(others.defaults["fused"])}
        super().__init__(matrices, defaults)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._others = others
        self._matrix_groups = list(self.param_groups)
        self.param_groups += others.param_groups
        others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients of matrices are overwritten."""
        assert closure is None, "a step is made from gradients that are there"
        for group in self._matrix_groups:
            for parameters in _stacks([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group)
        self._others.grad_scale = self.grad_scale  # type: ignore[attr-defined]
        self._others.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._others.step()

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of parameters of one shape."""
        keep: Tensor | float = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        momentum, lr = group["momentum"], group["lr"]
        gradients, buffers = [], []
        for p in parameters:
            assert p.grad is not None
            if self.grad_scale is not None:
                p.grad.div_(self.grad_scale)
            if self.found_inf is not None:
                p.grad.masked_fill_(self.found_inf.bool(), 0.0)  # a nan times 0 is a nan
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
            gradients.append(p.grad)
            buffers.append(state["momentum_buffer"])
        for buffer, gradient in zip(buffers, gradients, strict=True):
            buffer.mul_(1.0 - (1.0 - momentum) * keep).add_(gradient, alpha=1.0 - momentum)
        updates = buffers
        if group["nesterov"]:
            updates = [g.lerp_(b, momentum) for g, b in zip(gradients, buffers, strict=True)]
        shape = parameters[0].shape
        stacked = updates[0].unsqueeze(0) if len(updates) == 1 else torch.stack(updates)
        stacked = stacked.reshape(-1, *shape[-2:])
        directions = orthogonal(stacked, group["ns_steps"]).reshape(-1, *shape)
        length = keep * -lr * _length(shape, group["adjust_lr"])
        for p, direction in zip(parameters, directions.unbind(), strict=True):
            p.mul_(1.0 - lr * group["weight_decay"] * keep)
            p.add_(direction.to(p.dtype) * length)


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """The nearest orthogonal matrix of each of `matrices` [n, out, in], roughly, in bf16.

    Newton-Schulz iteration: all singular values of the result lie near 1 (0.7 to 1.2 after five
    steps), singular vectors stay. bf16 is exact enough, and the products are its whole cost.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=1e-7)[..., None, None]
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def _length(shape: torch.Size, adjust_lr: str) -> float:
    """What makes an orthogonal update of this shape as long as the learning rate means."""
    rows, columns = shape[-2:]
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters by shape and type, as many at a time as make one piece of work."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in parameters:
        kinds.setdefault((tuple(p.shape), p.dtype, p.device), []).append(p)
    for alike in kinds.values():
        # Shards of a mesh are not put together: each is updated by collectives of its own.
        sharded = hasattr(alike[0], "device_mesh")
        count = 1 if sharded else max(1, STACK_NUMBERS // alike[0].numel())
        for start in range(0, len(alike), count):
            yield alike[start : start + count]

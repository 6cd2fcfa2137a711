"""Cross entropy of a linear head without ever holding its logits in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that does not count."""

CHUNK_ROWS = 1024
"""Positions whose logits exist at one time. Every chunk reads and writes the whole fp32 weight
gradient once, so a chunk must carry enough products to pay for that."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """Summed cross entropy of `hidden @ weight.T` against `targets`, an fp32 scalar.

    `hidden` [N, d], `weight` [V, d], `targets` int64 [N]; positions whose target is -100 count
    nothing. `z_loss` adds z_loss * (log normaliser)^2 per counted position (PaLM,
    arXiv:2204.02311, section 5). Products run in the autocast type where autocast is on, sums in
    fp32 (fp64 for fp64 input). Gradients are made together with the loss, a chunk of rows at a
    time, so a backward pass can run once. `compiled` fuses the softmax with torch.compile.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, dtype, compiled)


def _exp_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites `logits` [R, V] with exp(logits - row maximum); returns maxima and sums."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    peak = logits.amax(-1, keepdim=True).to(wide)
    powers = (logits.to(wide) - peak).exp()
    logits.copy_(powers)
    return peak.squeeze(-1), powers.sum(-1)


@functools.cache
def _compiled_exp_rows() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_exp_rows, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows.

    With e = exp(logit - peak), s = sum(e) and a row factor r = (1 + 2 z lse) / s, the gradient of
    a logit is r * (e - [is target] * s / (1 + 2 z lse)). The bracket goes through the products as
    it is and r is applied to the narrow [R, d] sides, so the wide [R, V] matrix is exponentiated
    once and never normalised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        dtype: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(dtype, torch.float32)
        exp_rows = _compiled_exp_rows() if compiled else _exp_rows
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(dtype)
            for start in range(0, hidden.shape[0], CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                part = hidden[rows].to(dtype)
                valid = targets[rows] != IGNORE
                index = targets[rows].clamp(min=0).unsqueeze(-1)
                logits = part @ narrow.t()
                target_logit = logits.gather(-1, index).squeeze(-1).to(wide)
                peak, total = exp_rows(logits)
                lse = peak + total.log()
                row_loss = lse - target_logit
                if z_loss:
                    row_loss = row_loss + z_loss * lse.square()
                loss += row_loss.masked_fill(~valid, 0.0).sum()
                if not (need_hidden or need_weight):
                    continue
                factor = 1.0 + 2.0 * z_loss * lse
                at_target = (target_logit - peak).exp() - total / factor
                logits.scatter_(-1, index, at_target.to(dtype).unsqueeze(-1))
                scale = (factor / total).masked_fill(~valid, 0.0).unsqueeze(-1)
                if grad_hidden is not None:
                    grad_hidden[rows] = (logits @ narrow) * scale
                if need_weight:
                    product = logits.t() @ (part * scale).to(dtype)
                    if grad_weight is None:
                        grad_weight = product.to(weight.dtype)
                    else:
                        grad_weight += product
        ctx.gradients = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy can run backward only once")
        for gradient in gradients:
            if gradient is not None:
                gradient *= grad_output
        return (*gradients, None, None, None, None)

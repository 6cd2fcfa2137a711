"""Cross entropy of a linear head without ever holding its logits in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that does not count."""

CHUNK_ROWS = {"cpu": 512}
OTHER_CHUNK_ROWS = 2048
"""Positions whose logits exist at one time, by device. Every chunk reads and writes the whole fp32
weight gradient once, which costs about as much as 300 rows of products on a processor whose caches
also have to hold the chunk, and more rows the faster the device is next to its memory."""

EAGER_ROWS = 32
"""Rows whose powers exist in fp32 at one time where nothing fuses them."""


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
    """Overwrites `logits` [R, V] with exp(logits - row maximum); returns maxima and sums [R].

    The maximum stays in the type of the logits (it is one of them): with a wider one the CPU code
    generator vectorises at half width and takes three times as long.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    peak = logits.amax(-1, keepdim=True)
    powers = (logits.to(wide) - peak).exp().to(logits.dtype)
    logits.copy_(powers)
    return peak.squeeze(-1).to(wide), powers.sum(-1, dtype=wide)


def _eager_exp_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time, so that no wide copy of the chunk exists."""
    peaks, totals = zip(*(_exp_rows(rows) for rows in logits.split(EAGER_ROWS)))
    return torch.cat(peaks), torch.cat(totals)


@functools.cache
def _compiled_exp_rows() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_exp_rows, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows.

    With e = exp(logit - peak), s = sum(e) and a row factor f = 1 + 2 z lse, the gradient of a
    logit is f / s * (e - [is target] * s / f). The bracket goes through the products as it is and
    f / s is applied to the narrow [R, d] sides, so the wide [R, V] matrix is exponentiated once
    and never normalised.
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
        exp_rows = _compiled_exp_rows() if compiled else _eager_exp_rows
        loss = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        count = min(CHUNK_ROWS.get(hidden.device.type, OTHER_CHUNK_ROWS), hidden.shape[0])
        positions = torch.arange(count, device=hidden.device)
        # One buffer for all chunks: a fresh one each time costs more in page faults than its use.
        buffer = hidden.new_empty((count, weight.shape[0]), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(dtype)
            for start in range(0, hidden.shape[0], count):
                rows = slice(start, start + count)
                part = hidden[rows].to(dtype)
                valid = targets[rows] != IGNORE
                at = (positions[: part.shape[0]], targets[rows].clamp(min=0))
                logits = torch.mm(part, narrow.t(), out=buffer[: part.shape[0]])
                target_logit = logits[at].to(loss.dtype)
                peak, total = exp_rows(logits)
                lse = peak + total.log()
                row_loss = lse - target_logit + z_loss * lse.square()
                loss += row_loss.masked_fill(~valid, 0.0).sum()
                if not any(ctx.needs_input_grad):
                    continue
                factor = 1.0 + 2.0 * z_loss * lse
                logits[at] = ((target_logit - peak).exp() - total / factor).to(dtype)
                scale = (factor / total).masked_fill(~valid, 0.0).unsqueeze(-1)
                if grad_hidden is not None:
                    grad_hidden[rows] = (logits @ narrow) * scale
                if ctx.needs_input_grad[1]:
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

"""Cross entropy of a linear head without ever holding its logits in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that does not count."""

CPU_CHUNK_ROWS, CHUNK_ROWS = 512, 2048
"""Positions whose logits exist at one time. Every chunk reads and writes the whole fp32 weight
gradient, which costs as much as the products of about 300 rows on a GPU, so a chunk has to be
several times that; a CPU wants the chunk in its caches as well (512 was fastest of 128 to 2048)."""

EAGER_ROWS = 32
"""Rows whose powers exist in fp32 at one time where nothing fuses them."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    num_token_ids: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Summed cross entropy of `hidden @ weight.T` against `targets`, an fp32 scalar.

    `hidden` [N, d], `weight` [V, d], `targets` int64 [N]; positions whose target is -100 count
    nothing. `z_loss` adds z_loss * (log normaliser)^2 per counted position (PaLM,
    arXiv:2204.02311, section 5). Rows of `weight` from `num_token_ids` on take no part and get a
    zero gradient. Products run in the autocast type where autocast is on, sums in fp32 (fp64 for
    fp64 input). Gradients are made together with the loss, a chunk of rows at a time, so a
    backward pass can run once. `compiled` fuses the passes over the logits with torch.compile.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if _autocast(device) else hidden.dtype
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, z_loss, num_token_ids or weight.shape[0], dtype, compiled
    )


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _exp_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites `logits` [R, V] with exp(logits - row maximum); returns maxima and sums [R].

    The maxima stay in the type of the logits (they are some of them): the code generated for a CPU
    takes two to three times as long when they are widened here.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    peak = logits.amax(-1, keepdim=True)
    powers = (logits.to(wide) - peak).exp().to(logits.dtype)
    logits.copy_(powers)
    return peak.squeeze(-1), powers.sum(-1, dtype=wide)


def _eager_exp_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time, so that no wide copy of the chunk exists."""
    peaks, totals = zip(*(_exp_rows(rows) for rows in logits.split(EAGER_ROWS)))
    return torch.cat(peaks), torch.cat(totals)


def _accumulate(total: Tensor, part: Tensor) -> None:
    total += part


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


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
        num_token_ids: int,
        dtype: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        """The loss; leaves the gradients in `ctx`."""
        exp_rows = _compiled(_exp_rows) if compiled else _eager_exp_rows
        accumulate = _compiled(_accumulate) if compiled else _accumulate
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        limit = CPU_CHUNK_ROWS if hidden.device.type == "cpu" else CHUNK_ROWS
        size = min(limit, hidden.shape[0])
        positions = torch.arange(size, device=hidden.device)
        # One buffer for all chunks: a fresh one each time costs more in page faults than its use.
        buffer = hidden.new_empty((size, weight.shape[0]), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(dtype)
            for start in range(0, hidden.shape[0], size or 1):
                rows = slice(start, start + size)
                part = hidden[rows].to(dtype)
                valid = targets[rows] != IGNORE
                at_target = (positions[: len(part)], targets[rows].clamp(min=0))
                logits = torch.mm(part, narrow.t(), out=buffer[: len(part)])
                logits[:, num_token_ids:] = -torch.inf
                target_logit = logits[at_target].to(loss.dtype)
                peak, total = exp_rows(logits)
                peak = peak.to(loss.dtype)
                lse = peak + total.log()
                row_loss = lse - target_logit + z_loss * lse.square()
                loss += row_loss.masked_fill(~valid, 0.0).sum()
                if not (need_hidden or need_weight):
                    continue
                factor = 1.0 + 2.0 * z_loss * lse
                logits[at_target] = ((target_logit - peak).exp() - total / factor).to(dtype)
                scale = (factor / total).masked_fill(~valid, 0.0).unsqueeze(-1)
                if grad_hidden is not None:
                    grad_hidden[rows] = (logits @ narrow) * scale
                if grad_weight is not None:
                    accumulate(grad_weight, logits.t() @ (part * scale).to(dtype))
        ctx.gradients = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, scaled in place: they are as large as the head itself."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy can run backward only once")
        for gradient in gradients:
            if gradient is not None:
                gradient *= grad_output
        return (*gradients, None, None, None, None, None)

"""Cross entropy of a linear head without ever holding its logits in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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


class VocabularyShard(Protocol):
    """Rows of the vocabulary that this process has, where several share embedding and head."""

    start: int
    """The first of them."""

    def local(self, rows: Tensor) -> Tensor:
        """This process's rows of a whole parameter."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes; no gradient."""

    def max(self, value: Tensor) -> Tensor:
        """The largest over the processes; no gradient."""

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all rows, in their order, of this process's [..., rows]; no gradient."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    num_token_ids: int | None = None,
    compiled: bool = False,
    shard: VocabularyShard | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Summed cross entropy of `hidden @ weight.T + bias` against `targets`, an fp32 scalar.

    `hidden` [N, d], `weight` [V, d], `bias` [V], `targets` int64 [N]; positions whose target is
    -100 count nothing. Logits go through softcap * tanh(logits / softcap) where a softcap is given
    (Gemma 2, arXiv:2408.00118). `z_loss` adds z_loss * (log normaliser)^2 per counted position
    (PaLM, arXiv:2204.02311, section 5). Rows of `weight` and `bias` from `num_token_ids` on take
    no part and get a zero gradient. Products run in the autocast type where autocast is on, sums
    in fp32 (fp64 for fp64 input). Gradients are made together with the loss, a chunk of rows at a
    time, so a backward pass can run once. `compiled` fuses the passes over the logits with
    torch.compile. With a `shard`, weight and bias are this process's rows of those that several
    share: they tell each other three numbers a position, never logits, and all get the same loss
    and the whole gradient of `hidden`. `low_rank`, inner [N, r] and b [V, r], adds inner @ b.T to
    the logits (arXiv:2106.09685): with a `weight` that needs no gradient, none of its size is made.
    """
    assert shard is None or low_rank is None, "a head that is shared has no adapter"
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if _autocast(device) else hidden.dtype
    if shard is not None and num_token_ids is not None:
        num_token_ids = min(max(num_token_ids - shard.start, 0), weight.shape[0])
    token_rows = weight.shape[0] if num_token_ids is None else num_token_ids
    how = _How(softcap, z_loss, token_rows, dtype, compiled, shard)
    inner, b = low_rank or (None, None)
    # A tensor that is only traced has no numbers to count.
    rows = _counted_rows(targets) if device == "cpu" and type(targets) is Tensor else None
    if rows is not None:
        hidden, targets = hidden[rows], targets[rows]
        inner = None if inner is None else inner[rows]
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, how, inner, b)


def _counted_rows(targets: Tensor) -> Tensor | None:
    """The positions that count, filled up to whole chunks; None where nearly all count.

    Others give nothing to the loss, and their logits need not be made. Chunks of one size are
    compiled once. Not for devices that would have to tell the host how many there are.
    """
    counts = targets != IGNORE
    chunks = -(-max(1, int(counts.sum())) // CPU_CHUNK_ROWS)
    if chunks * CPU_CHUNK_ROWS > 0.75 * len(targets):
        return None
    return torch.argsort(~counts, stable=True)[: chunks * CPU_CHUNK_ROWS]


class _How(NamedTuple):
    """What a loss is made with besides tensors."""

    softcap: float | None
    z_loss: float
    num_token_ids: int
    dtype: torch.dtype
    compiled: bool
    shard: VocabularyShard | None


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _exp_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites `logits` [R, V] with exp(logits - row maximum); returns maxima and sums [R].

    The maxima stay in the type of the logits (they are some of them): the code generated for a CPU
    takes two to three times as long when they are widened here.
    """
    peak = logits.amax(-1, keepdim=True)
    return peak.squeeze(-1), _exp_below(logits, peak)


def _exp_below(logits: Tensor, peak: Tensor) -> Tensor:
    """Overwrites `logits` [R, V] with exp(logits - peak), peak [R, 1]; returns sums [R]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    powers = (logits.to(wide) - peak).exp().to(logits.dtype)
    logits.copy_(powers)
    return powers.sum(-1, dtype=wide)


def _eager_exp_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same, a few rows at a time, so that no wide copy of the chunk exists."""
    peaks, totals = zip(*(_exp_rows(rows) for rows in logits.split(EAGER_ROWS)))
    return torch.cat(peaks), torch.cat(totals)


def _capped_peak(logits: Tensor, softcap: float) -> Tensor:
    """Row maxima [R, 1] of the capped logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return _capped(logits.amax(-1, keepdim=True).to(wide), softcap)[0]


def _capped_exp_rows(logits: Tensor, peak: Tensor, softcap: float, out: Tensor) -> Tensor:
    """Writes exp(c - peak) * dc / dlogit of the capped logits c to `out`; returns sums of exp [R].

    The slope is at hand here and is not once the logits are gone. Where this is compiled, `out`
    is not `logits`: code generated for a CPU takes twice as long to overwrite what it reads.
    """
    capped, slope = _capped(logits.to(peak.dtype), softcap)
    powers = (capped - peak).exp()
    out.copy_(powers * slope)
    return powers.sum(-1)


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """cap * tanh(logits / cap) and its slope; tanh(x) = 2 sigmoid(2x) - 1 is the faster form."""
    half = torch.sigmoid(logits * (2.0 / softcap))
    return half * (2.0 * softcap) - softcap, 4.0 * half * (1.0 - half)


def _powers(logits: Tensor, how: _How, spare: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Powers times the slope of the cap [R, V] over `logits` or in `spare`; row maxima and sums."""
    if how.softcap is None and how.shard is None:
        exp_rows = _compiled(_exp_rows) if how.compiled else _eager_exp_rows
        return logits, *exp_rows(logits)
    if how.softcap is None:
        return _shared_powers(logits, how)
    # tanh of -inf is a number like any other: rows that are no token are left out of it.
    tokens = logits[:, : how.num_token_ids]
    capped_peak = _capped_peak if spare is None else _compiled(_capped_peak)
    peaks = capped_peak(tokens, how.softcap)
    if how.shard is not None:
        peaks = how.shard.max(peaks)
    if spare is None:
        pairs = zip(tokens.split(EAGER_ROWS), peaks.split(EAGER_ROWS))
        parts = [_capped_exp_rows(rows, peak, how.softcap, rows) for rows, peak in pairs]
        powers, totals = logits, torch.cat(parts)
    else:
        powers = spare[: len(logits)]
        totals = _compiled(_capped_exp_rows)(
            tokens, peaks, how.softcap, powers[:, : how.num_token_ids]
        )
    powers[:, how.num_token_ids :] = 0.0
    return powers, peaks.squeeze(-1), totals if how.shard is None else how.shard.sum(totals)


def _shared_powers(logits: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """Powers over `logits`, row maxima and sums, both over the rows of all processes."""
    assert how.shard is not None
    peaks = how.shard.max(logits.amax(-1, keepdim=True))
    if how.compiled:
        totals = _compiled(_exp_below)(logits, peaks)
    else:
        pairs = zip(logits.split(EAGER_ROWS), peaks.split(EAGER_ROWS))
        totals = torch.cat([_exp_below(rows, peak) for rows, peak in pairs])
    return logits, peaks.squeeze(-1), how.shard.sum(totals)


class _Targets(NamedTuple):
    """The logits of the targets of some positions."""

    at: tuple[Tensor, Tensor]
    """Where they are among this process's; of a target that another has, anywhere."""
    logit: Tensor
    """Capped, in wide type [R]."""
    slope: Tensor | None
    """Of the cap."""
    here: Tensor | None
    """Whether this process has them; None: it has all."""


def _targets(logits: Tensor, targets: Tensor, positions: Tensor, how: _How) -> _Targets:
    here = None
    if how.shard is not None:
        targets = targets - how.shard.start
        here = (targets >= 0) & (targets < logits.shape[1])
        targets = targets.clamp(max=logits.shape[1] - 1)
    at = (positions[: len(logits)], targets.clamp(min=0))
    logit, slope = logits[at].to(torch.promote_types(how.dtype, torch.float32)), None
    if how.softcap is not None:
        logit, slope = _capped(logit, how.softcap)
        logit = logit.masked_fill(targets >= how.num_token_ids, -torch.inf)
    if how.shard is not None:
        logit = how.shard.sum(logit.masked_fill(~here, 0.0))
    return _Targets(at, logit, slope, here)


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
    and never normalised. A soft cap multiplies the bracket by its slope.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        how: _How,
        inner: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        """The loss; leaves the gradients in `ctx`."""
        dtype = how.dtype
        accumulate = _compiled(_accumulate) if how.compiled else _accumulate
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        loss = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # The first chunk writes it: a pass over memory less than to add to zeros.
        fresh = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = fresh(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        added = None if inner is None or b is None else _LowRank(inner, b, dtype)
        size = min(CPU_CHUNK_ROWS if hidden.device.type == "cpu" else CHUNK_ROWS, len(hidden))
        positions = torch.arange(size, device=hidden.device)
        # One buffer for all chunks: a fresh one each time costs more in page faults than its use.
        buffer = hidden.new_empty((size, weight.shape[0]), dtype=dtype)
        spare = torch.empty_like(buffer) if how.softcap is not None and how.compiled else None
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = weight.to(dtype)
            narrow_bias = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], size or 1):
                rows = slice(start, start + size)
                part = hidden[rows].to(dtype)
                valid = targets[rows] != IGNORE
                logits = _logits(part, narrow, narrow_bias, buffer[: len(part)], added, rows)
                logits[:, how.num_token_ids :] = -torch.inf
                target = _targets(logits, targets[rows], positions, how)
                powers, peak, total = _powers(logits, how, spare)
                peak = peak.to(loss.dtype)
                lse = peak + total.log()
                row_loss = lse - target.logit + how.z_loss * lse.square()
                loss += row_loss.masked_fill(~valid, 0.0).sum()
                if not any(ctx.needs_input_grad):
                    continue
                factor = 1.0 + 2.0 * how.z_loss * lse
                _put_brackets(powers, target, (target.logit - peak).exp() - total / factor)
                scale = (factor / total).masked_fill(~valid, 0.0).unsqueeze(-1)
                if grad_hidden is not None:
                    grad_hidden[rows] = (powers @ narrow) * scale
                if grad_weight is not None:
                    product = powers.t() @ (part * scale).to(dtype)
                    (accumulate if start else torch.Tensor.copy_)(grad_weight, product)
                if grad_bias is not None:
                    grad_bias += (powers.t() @ scale.to(dtype)).squeeze(-1)
                if added is not None:
                    added.collect(powers, scale, rows)
        if grad_hidden is not None and how.shard is not None:
            grad_hidden = how.shard.sum(grad_hidden)
        more = (None, None) if added is None else (added.grad_inner, added.grad_b)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias, *more)
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
        return (*gradients[:3], None, None, *gradients[3:])


class _LowRank:
    """What is added to the logits, inner @ b.T, and its gradients."""

    def __init__(self, inner: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        self.inner, self.b = inner.to(dtype), b.to(dtype)
        self.grad_inner, self.grad_b = torch.zeros_like(inner), torch.zeros_like(b)

    def add(self, logits: Tensor, rows: slice) -> None:
        """Add the part of some rows to their logits [R, V]."""
        logits.addmm_(self.inner[rows], self.b.t())

    def collect(self, powers: Tensor, scale: Tensor, rows: slice) -> None:
        """Add up the gradients, of which powers [R, V] times scale [R, 1] is that of logits."""
        self.grad_inner[rows] = (powers @ self.b) * scale
        self.grad_b += powers.t() @ (self.inner[rows] * scale).to(powers.dtype)


def _put_brackets(powers: Tensor, target: _Targets, bracket: Tensor) -> None:
    """Write what the gradient of the targets' logits is made of over their powers [R, V]."""
    if target.slope is not None:
        bracket = bracket * target.slope
    if target.here is not None:
        bracket = torch.where(target.here, bracket, powers[target.at])
    powers[target.at] = bracket.to(powers.dtype)


def _logits(
    part: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    added: _LowRank | None,
    rows: slice,
) -> Tensor:
    """`part @ weight.T + bias`, with what is added to these rows, written over `out`."""
    if bias is None:
        torch.mm(part, weight.t(), out=out)
    else:
        torch.addmm(bias, part, weight.t(), out=out)
    if added is not None:
        added.add(out, rows)
    return out

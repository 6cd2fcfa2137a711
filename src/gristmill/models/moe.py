"""A feed-forward layer of experts, of which each token visits a few, and no token is turned away.

    x ─ router ─ scores ─ choice of k experts a token and their weights
    │                        │
    └─ rows sorted by expert ┴─ gate, up ─ act(gate) * up * weight ─ down ─ sum of a token's rows

Every (token, expert) pair has a row of its own. Rows of one expert lie together, so that each of
the three products is one grouped product over all experts. There is no capacity: the number of
rows is known beforehand, only the borders between experts are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models.mlp import Gated, build_activation


class Choice(NamedTuple):
    """Where N tokens go."""

    experts: Tensor
    """The experts of each token, int64 [N, k]."""
    weights: Tensor
    """What their outputs are multiplied with, float32 [N, k]."""
    probabilities: Tensor
    """The scores of all experts, of which a token's add up to one; float32 [N, E]."""


class Rows(NamedTuple):
    """Where the pairs of token and expert lie: R rows, those of one expert together.

    Rows that no pair has hold any token with weight 0.
    """

    ends: Tensor
    """Where the rows of each expert end, int32 [E]."""
    source: Tensor
    """The token of each row, int64 [R]."""
    slots: Tensor
    """The row of each pair, int64 [N, k]."""
    visits: Tensor
    """How many tokens visit each expert, int64 [E]."""


class Load(NamedTuple):
    """Where a layer's tokens went, in training; what nobody uses is None."""

    balance: Tensor | None
    """The load-balancing loss, a float32 scalar without its weight: see `balance_loss`."""
    experts: Tensor | None
    """The experts of each token, int64 [B, T, k], where a bias follows from them."""


class MixtureOfExperts(nn.Module):
    """Router and gated experts (arXiv:2101.03961), with shared ones (arXiv:2401.06066) or without.

    Parameters: router.weight [E, d]; selection_bias [E], which no gradient reaches;
    experts.{gate,up}.weight [E, f, d], experts.down.weight [E, d, f]; shared.{gate,up,down}.weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None, "the configuration has no experts"
        self.moe = config.moe
        self.router = nn.Linear(config.hidden_size, config.moe.num_experts, bias=False)
        if config.moe.selection_bias:
            bias = torch.zeros(config.moe.num_experts)
            self.selection_bias = nn.Parameter(bias, requires_grad=False)
        self.experts = Experts(config)
        if config.moe.num_shared_experts:
            width = config.moe.num_shared_experts * config.moe.intermediate_size
            self.shared = Gated(config, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Load | None]:
        """What its experts make of each token of x [B, T, d], and in training their load."""
        tokens = x.flatten(0, 1)
        choice = self.choose(tokens)
        rows = sort_by_expert(choice.experts, self.moe.num_experts, self._group_multiple(choice))
        y = self.experts(tokens, choice, rows).view(x.shape)
        if self.moe.num_shared_experts:
            y = y + self.shared(x)
        if not self.training:
            return y, None
        balance = experts = None
        if self.moe.balance_loss > 0:
            balance = balance_loss(choice.probabilities, rows.visits)
        if self.moe.selection_bias:
            experts = choice.experts.view(*x.shape[:-1], -1)
        return y, Load(balance, experts)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MixtureOfExperts:
        """What `to`, `bfloat16` and the like go through: the bias of the choice stays in fp32.

        It is large against the differences that it makes between experts.
        """
        exact = self.selection_bias.data if self.moe.selection_bias else None
        super()._apply(fn, recurse)
        if exact is not None and self.selection_bias.dtype != exact.dtype:
            self.selection_bias.data = exact.to(self.selection_bias.device)
        return self

    def choose(self, tokens: Tensor) -> Choice:
        """The experts of tokens [N, d] and their weights, in fp32 whatever the precision.

        A small error of a score changes which experts are visited (arXiv:2101.03961, 2.4).
        """
        moe = self.moe
        weight = self.router.weight
        with _without_autocast(tokens.device.type):
            logits = F.linear(tokens.float(), weight.float())
        scores = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
        with torch.no_grad():
            worth = scores + self.selection_bias if moe.selection_bias else scores
            experts = self._best_groups(worth).topk(moe.num_experts_per_token, -1).indices
        weights = scores.gather(-1, experts)
        if moe.normalize:
            # Sigmoids may all be 0.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if moe.score == "sigmoid":
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Choice(experts, weights * moe.scale, scores)

    def _best_groups(self, worth: Tensor) -> Tensor:
        """`worth` [N, E], with -inf outside of each token's best groups (arXiv:2405.04434)."""
        moe = self.moe
        if moe.num_groups_per_token >= moe.num_groups:
            return worth
        grouped = worth.unflatten(-1, (moe.num_groups, -1))
        if moe.group_score == "max":
            group_worth = grouped.amax(-1)
        else:
            group_worth = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best = group_worth.topk(moe.num_groups_per_token, -1).indices
        outside = torch.ones_like(group_worth, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)

    def _group_multiple(self, choice: Choice) -> int:
        """What the number of an expert's rows is rounded up to.

        oneDNN prepares a product in bf16 for each number of rows that it has not met lately, which
        takes longer than the product; there are far fewer multiples of 32 to meet.
        """
        weight = self.experts.gate.weight
        dtype = self.experts.compute_dtype(choice.experts.numel())
        large = choice.experts.numel() >= 2 * ROUNDED * self.moe.num_experts
        return ROUNDED if large and weight.device.type == "cpu" and dtype.itemsize == 2 else 1


ROUNDED = 32
"""Rows of an expert are rounded up to a multiple of this where it pays (see `_group_multiple`)."""


def balance_loss(probabilities: Tensor, visits: Tensor) -> Tensor:
    """The load-balancing loss of one layer, a float32 scalar (arXiv:2101.03961, equation 4).

    E * sum over experts e of (visits_e / N) * (mean over N tokens of probability_e), for
    probabilities [N, E] that add up to one and E counts of visiting tokens. It is k, the number of
    experts a token visits, when all are visited alike, and E when all tokens go to the same with
    certainty. `load_balancing_loss_func` of transformers gives the same for one layer; for several
    it takes the means of shares and of probabilities over layers before it multiplies them.
    """
    share = visits.float() / probabilities.shape[0]
    return probabilities.shape[1] * (share * probabilities.mean(0)).sum()


def count_visits(experts: Sequence[Tensor], counted: Tensor, num_experts: int) -> Tensor:
    """How many of the tokens where `counted` (bool [B, T]) is true visit each expert.

    Of each layer, whose choice is int64 [B, T, k]: int64 [layers, E].
    """
    chosen = torch.stack(list(experts)).flatten(1)
    ones = counted.long().unsqueeze(-1).expand_as(experts[0]).flatten().expand_as(chosen)
    return chosen.new_zeros(len(experts), num_experts).scatter_add_(1, chosen, ones)


@torch.no_grad()
def move_biases(model: nn.Module, visits: Tensor, step: Tensor) -> None:
    """Move the selection biases of a model, in place, by `step` towards even loads.

    Up where an expert was visited less than the mean of its layer, down where more; `visits` are
    those of a whole batch, int64 [layers, E] (arXiv:2408.15664, algorithm 1; arXiv:2412.19437,
    section 2.1.2).
    """
    lacking = visits.sum(-1, keepdim=True) - visits.shape[-1] * visits
    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    for layer, sign in zip(layers, lacking.sign(), strict=True):
        layer.selection_bias += step * sign


def sort_by_expert(experts: Tensor, num_experts: int, multiple: int = 1) -> Rows:
    """Rows for the pairs of token and expert that int64 [N, k] lists.

    The rows of an expert are in the order of tokens and begin at a multiple of `multiple`. All
    shapes follow from those given: nothing waits for the device.
    """
    per_token = experts.shape[1]
    sorted_experts, pair = experts.flatten().sort(stable=True)
    every = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(sorted_experts, every, right=True)
    visits = ends.diff(prepend=ends.new_zeros(1))
    if multiple == 1:
        order = torch.arange(len(pair), device=experts.device)
        slots = torch.empty_like(pair).scatter(0, pair, order)
        return Rows(ends.int(), pair // per_token, slots.view(experts.shape), visits)
    rounded = (visits + (multiple - 1)) // multiple * multiple
    rounded_ends = rounded.cumsum(0)
    shift = (rounded_ends - rounded) - (ends - visits)
    row = torch.arange(len(pair), device=experts.device) + shift.index_select(0, sorted_experts)
    num_rows = len(pair) + num_experts * (multiple - 1)
    source = pair.new_zeros(num_rows).scatter(0, row, pair // per_token)
    slots = torch.empty_like(pair).scatter(0, pair, row)
    return Rows(rounded_ends.int(), source, slots.view(experts.shape), visits)


class Experts(nn.Module):
    """E gated feed-forward layers of one shape: down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None, "the configuration has no experts"
        d, inner, count = config.hidden_size, config.moe.intermediate_size, config.moe.num_experts
        self.activation = build_activation(config)
        self.gate = ExpertLinear(count, d, inner)
        self.up = ExpertLinear(count, d, inner)
        self.down = ExpertLinear(count, inner, d)

    def forward(self, tokens: Tensor, choice: Choice, rows: Rows) -> Tensor:
        """The weighted sum of its experts' outputs for each of tokens [N, d], [N, d]."""
        dtype = self.compute_dtype(choice.experts.numel())
        x = _Spread.apply(tokens.to(dtype), rows.source, rows.slots)
        gate, up = self.gate(x, rows.ends), self.up(x, rows.ends)
        # Weights are applied to what the last product reads: its result need not be kept then.
        slots = rows.slots.flatten()
        weights = choice.weights.new_zeros(len(x)).scatter(0, slots, choice.weights.flatten())
        inner = (self.activation(gate) * up * weights.unsqueeze(-1)).to(dtype)
        return _Collect.apply(self.down(inner, rows.ends), rows.source, rows.slots)

    def compute_dtype(self, num_rows: int) -> torch.dtype:
        """What the products are computed in: the autocast type where autocast is on.

        It is the weights' own where so few rows visit so few experts that the copy of all experts
        in another type would take longer than the products.
        """
        weight = self.gate.weight
        device = weight.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return weight.dtype
        if num_rows < len(weight) and not torch.is_grad_enabled():
            return weight.dtype
        return torch.get_autocast_dtype(device)


class ExpertLinear(nn.Module):
    """A matrix for each expert; `weight` is [E, out, in]."""

    def __init__(self, num_experts: int, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size_out, size_in))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [R, in], those of expert e before ends[e], each times its expert's matrix: [R, out].

        The values of rows after ends[-1] mean nothing.
        """
        weight = self.weight.to(rows.dtype)
        # The kernels want strides of 16 bytes.
        step = 16 // rows.dtype.itemsize
        pad_in, pad_out = -weight.shape[2] % step, -weight.shape[1] % step
        if pad_in or pad_out:
            rows, weight = F.pad(rows, (0, pad_in)), F.pad(weight, (0, pad_in, 0, pad_out))
        out = grouped_linear(rows, weight, ends)
        return out[:, : self.weight.shape[1]] if pad_out else out


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [R, in] times weight [E, out, in] of their group, of which the e-th ends at ends[e]."""
    traced = torch.compiler.is_compiling() or rows.device.type == "meta"
    if traced and rows.dtype != torch.bfloat16:
        return _GroupedLinear.apply(rows, weight, ends)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


class _GroupedLinear(torch.autograd.Function):
    """The grouped product for the compiler, which knows torch's own in bf16 only (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """See `grouped_linear`."""
        ctx.save_for_backward(rows, weight, ends)
        return _grouped_product(rows, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of rows and of all experts' weights, 0 for those without a row."""
        rows, weight, ends = ctx.saved_tensors
        grad_rows = _grouped_product(grad, weight, ends)
        return grad_rows, _grouped_product(grad.transpose(0, 1), rows, ends), None


@torch.library.custom_op("gristmill::grouped_product", mutates_args=())
def _grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [R, m] by b [E, m, n]: [R, n]; or a [m, R] by b [R, n]: [E, m, n]."""
    return F.grouped_mm(a, b, offs=ends)


@_grouped_product.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(ends), a.shape[0], b.shape[1])


class _Spread(torch.autograd.Function):
    """Tokens to the rows of their experts; backward sums a token's rows in a fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        """tokens [N, d] to rows [R, d]."""
        ctx.save_for_backward(slots)
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of tokens."""
        (slots,) = ctx.saved_tensors
        return _sum_of_rows(grad, slots), None, None


class _Collect(torch.autograd.Function):
    """The sum of each token's rows; backward gives each row its token's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        """rows [R, d] to tokens [N, d]."""
        ctx.save_for_backward(source)
        return _sum_of_rows(rows, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of rows; of those that no pair has it means nothing."""
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source), None, None


def _sum_of_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """The sum over k of rows [R, d] at slots [N, k], [N, d], added up in fp32."""
    return rows.index_select(0, slots.flatten()).unflatten(0, slots.shape).sum(1)


def _without_autocast(device: str) -> torch.autocast:
    """Autocast switched off, on a device that may have none (meta)."""
    known = device if torch.amp.is_autocast_available(device) else "cpu"
    return torch.autocast(known, enabled=False)

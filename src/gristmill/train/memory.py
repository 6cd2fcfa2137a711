"""How many samples are computed at a time, and what is computed twice for that."""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models import counts
from gristmill.util.errors import UserError

MAX_MICRO_TOKENS = 2**14
"""Tokens of an `auto` micro-batch at most: beyond it no device gets faster, only fuller."""

ENOUGH_TOKENS = 2**11
"""Tokens of a micro-batch that keep a device busy: for fewer it is better to compute some twice."""

KINDS: tuple[str | float, ...] = ("none", "selective", "full")


def fit_memory(
    model: ModelConfig,
    *,
    seq_len: int,
    most: int,
    precision: str,
    budget_bytes: float,
    micro_batch: int | None,
    recompute: str | float,
    mesh: counts.Sizes | None = None,
) -> tuple[int, str | float]:
    """Samples of a micro-batch, at most `most`, and the recomputation, by the planner's estimate.

    A given `micro_batch` is kept; else it is the largest power of two that pays. `auto`
    recomputation is the least that fits. Where nothing fits it is the smallest of all. `mesh`: how
    several devices share the model, each of which has the budget.
    """
    kinds = KINDS if recompute == "auto" else (recompute,)
    if micro_batch is None:
        top = min(max(1, MAX_MICRO_TOKENS // seq_len), most)
        sizes = [2**power for power in range(top.bit_length() - 1, -1, -1)]
    else:
        sizes = [min(micro_batch, most)]
    enough = min(sizes[0], max(1, ENOUGH_TOKENS // seq_len))
    busy = [(size, kind) for kind in kinds for size in sizes if size >= enough]
    small = [(size, kind) for size in sizes if size < enough for kind in kinds]
    for size, kind in busy + small:
        need = counts.training_memory_bytes(model, size, seq_len, precision, kind, mesh)
        if need <= budget_bytes:
            return size, kind
    return sizes[-1], kinds[-1]


def check_recompute(recompute: str | float, compile: str) -> None:
    """Raise UserError for a share of activations that is none, or that nothing would honour."""
    if isinstance(recompute, str):
        return
    if not 0.0 <= recompute <= 1.0:
        raise UserError(
            f"--recompute {recompute:g} is not a share of the activations. Use 0 to 1, none, "
            "selective, full or auto.",
            {"--recompute": "auto"},
        )
    if compile == "off":
        raise UserError(
            f"--recompute {recompute:g}: only the compiler can keep a share of the activations, "
            "and --compile off leaves it out. Use selective or full.",
            {"--recompute": "selective"},
        )

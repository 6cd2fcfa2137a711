"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "wsd", "linear", "constant"]


def lr_at(
    step: int,
    *,
    peak: float,
    min_lr: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule,
    decay_fraction: float = 0.2,
) -> float:
    """Learning rate of `step` (counted from 0).

    Warm-up rises in equal parts and reaches `peak` in its last step; the first step is not idle.
    Then comes the schedule, and the last step (total_steps - 1) has exactly `min_lr`:

    cosine    half a cosine from peak to min_lr (arXiv:1608.03983)
    linear    a straight line from peak to min_lr
    wsd       peak, then a straight line over the last `decay_fraction` (arXiv:2404.06395)
    constant  peak to the end; min_lr is not used

    A run whose warm-up takes every step ends at peak. Steps past the end keep the last value.
    """
    assert step >= 0
    assert total_steps >= 1
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if schedule == "constant":
        return peak
    # The last step that still has the peak; the fall takes the steps after it.
    top = max(warmup_steps - 1, 0)
    if schedule == "wsd":
        num_decay_steps = max(1, round(total_steps * decay_fraction))
        top = max(top, total_steps - 1 - num_decay_steps)
    done = min(1.0, (step - top) / max(1, total_steps - 1 - top))
    if done <= 0.0:
        return peak
    if done == 1.0:
        return min_lr
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return min(peak, min_lr + (peak - min_lr) * left)  # min: rounding must not pass the peak

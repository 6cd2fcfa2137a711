"""When a loss is a spike: far above those of the steps before it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gristmill.config.sections import StepArgs

WINDOW, DEVIATIONS = 100, 6.0
"""What `--train.spike_window` and `--train.spike_deviations` are when they are not typed."""
SMALLEST = 0.01
"""A deviation is at least this share of the mean: losses that hardly move are not all spikes."""


def most_loss(train: StepArgs, losses: Sequence[float]) -> float:
    """The largest loss of the next step that is no spike; infinite while too few are known.

    mean + k * deviation of the last `spike_window` losses that were no spikes themselves. It is
    known before the step, from numbers that all ranks share, so the device alone can compare.
    """
    window = train.spike_window or WINDOW
    if train.on_spike == "off" or len(losses) < window:
        return math.inf
    last = losses[-window:]
    mean = math.fsum(last) / window
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in last) / window)
    return mean + (train.spike_deviations or DEVIATIONS) * max(deviation, SMALLEST * abs(mean))


def remember(train: StepArgs, losses: list[float], loss: float) -> list[float]:
    """The losses with one more; none where nobody looks at them."""
    if train.on_spike == "off":
        return []
    return [*losses, loss][-(train.spike_window or WINDOW) :]

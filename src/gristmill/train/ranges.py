"""The values that numbers may take, as one table; no torch."""

from __future__ import annotations

import math
from typing import Any

from gristmill.config.commands import Training
from gristmill.util.errors import UserError

RANGES: dict[str, tuple[float, float]] = {
    "train.lr_decay_fraction": (0.0, 1.0),
    "train.max_norm": (1e-12, math.inf),
    "train.z_loss": (0.0, math.inf),
    "train.log_interval": (1, math.inf),
    "train.max_bad_steps": (1, math.inf),
    "train.keep_every": (1, math.inf),
    "train.bias_update_speed": (0.0, math.inf),
    "train.spike_window": (2, 100_000),
    "train.spike_deviations": (1e-6, math.inf),
    "eval.max_iters": (1, math.inf),
    "eval.sample_interval": (1, math.inf),
    "eval.sample_tokens": (1, math.inf),
    "eval.command_interval": (1, math.inf),
    "optimizer.weight_decay": (0.0, math.inf),
    "optimizer.eps": (0.0, math.inf),
    "optimizer.betas": (0.0, 1.0 - 1e-12),
    "optimizer.adamw_lr": (1e-12, math.inf),
    "optimizer.momentum": (0.0, 1.0 - 1e-12),
    "optimizer.ns_steps": (1, 99),
    "model_config.num_layers": (1, math.inf),
    "max_restarts": (0, math.inf),
    "seed": (-(2**63), 2**64 - 1),
}
"""Option -> its smallest and its largest value. Unset options and `auto` are not looked at."""


def check_ranges(cfg: Training) -> None:
    """Raise UserError for a number that is outside its range, naming both."""
    for option, (low, high) in RANGES.items():
        value: Any = cfg
        for name in option.split("."):
            value = getattr(value, name, None)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and not low <= number <= high:
                limits = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                raise UserError(f"--{option} {number:g} is out of range. It takes {limits}.")

"""How long a run is: batch sizes, steps, warm-up and intervals, from settings and data. No torch.

Values that are `auto` fit the run; values that the user typed are checked against it, and the
error carries the options that would be right.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from gristmill.config.sections import EvalArgs, StepArgs
from gristmill.util.errors import UserError

STEPS_WANTED = 1000
"""How many optimizer steps an `auto` batch aims at: enough for the schedule to have a shape."""
MIN_STEP_TOKENS, MAX_STEP_TOKENS = 2**12, 2**19
"""Bounds of an `auto` global batch; half a million tokens is what GPT-3's smaller models used."""


@dataclass(frozen=True)
class Length:
    """A run's extent, all resolved. Samples are of `seq_len` targets each."""

    seq_len: int
    global_batch_size: int
    total_steps: int
    warmup_steps: int
    save_interval: int
    eval_interval: int
    max_time_s: float | None

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.global_batch_size


def plan_length(
    train: StepArgs, evaluation: EvalArgs, *, seq_len: int, num_samples: int, earlier: Any = None
) -> Length:
    """The run's extent; `earlier` is the `Length` of the run it continues, which settles `auto`.

    Raises UserError for typed values that cannot work together.
    """
    wanted = _wanted_tokens(train, seq_len, num_samples)
    batch = _global_batch(train, seq_len, wanted, earlier)
    total = _total_steps(train, seq_len, num_samples, batch, wanted)
    interval = max(1, min(1000, math.ceil(total / 10)))
    return Length(
        seq_len=seq_len,
        global_batch_size=batch,
        total_steps=total,
        warmup_steps=_warmup(train, total, earlier),
        save_interval=_positive("--train.save_interval", train.save_interval, interval),
        eval_interval=_positive("--eval.interval", evaluation.interval, interval),
        max_time_s=None if train.max_time is None else _max_time_s(train.max_time),
    )


def _max_time_s(text: str) -> float:
    limit = seconds(text)
    if limit <= 0:
        raise UserError(f"--train.max_time {text} trains nothing. Give a longer time, such as 30m.")
    return limit


def seconds(text: str, option: str = "--train.max_time") -> float:
    """Seconds in a duration such as 90s, 30m, 2h, 1h30m or a bare number of seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.replace(" ", ""))
    if not parts or "".join(a + b for a, b in parts) != text.replace(" ", ""):
        raise UserError(f"{option} {text} is not a duration. Write 90s, 30m, 2h or 1h30m.")
    return sum(float(n) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[u] for n, u in parts)


def _wanted_tokens(train: StepArgs, seq_len: int, num_samples: int) -> int:
    """Tokens the run is for, before it is cut into whole steps; one epoch unless limited."""
    for option, value in (("max_tokens", train.max_tokens), ("epochs", train.epochs)):
        if value != "auto" and value is not None and value <= 0:
            raise UserError(f"--train.{option} {value} trains nothing. Give a value above 0.")
    epochs = int(num_samples * seq_len * (train.epochs or 1.0))
    if train.max_tokens == "auto":
        return epochs
    return train.max_tokens if train.epochs is None else min(train.max_tokens, epochs)


def _global_batch(train: StepArgs, seq_len: int, wanted: int, earlier: Length | None) -> int:
    micro = train.micro_batch_size
    if train.global_batch_size != "auto":
        batch = _positive("--train.global_batch_size", train.global_batch_size, 1)
        if micro != "auto" and micro > batch:
            raise UserError(
                f"micro_batch_size={micro} is above global_batch_size={batch} (samples per step). "
                f"Use a micro-batch of at most {batch}.",
                fix={"--train.micro_batch_size": batch},
            )
        return batch
    if earlier is not None:
        return earlier.global_batch_size
    tokens = min(MAX_STEP_TOKENS, max(MIN_STEP_TOKENS, wanted // STEPS_WANTED))
    batch = max(1, min(2 ** round(math.log2(max(1.0, tokens / seq_len))), wanted // seq_len))
    if micro != "auto":
        batch = math.ceil(batch / micro) * micro
    return batch


def _total_steps(train: StepArgs, seq_len: int, num_samples: int, batch: int, wanted: int) -> int:
    step_tokens = seq_len * batch
    by_tokens = wanted // step_tokens
    if train.max_tokens == "auto":
        # A data set or fraction of an epoch smaller than a batch still makes one step.
        by_tokens = max(1, by_tokens)
    if by_tokens == 0:
        fits = max(1, wanted // seq_len)
        raise UserError(
            f"max_tokens={wanted:,} is below one global batch ({batch} samples x {seq_len} tokens "
            f"= {step_tokens:,} tokens): there would be no optimizer step. "
            f"Use more tokens or a smaller batch.",
            fix={"--train.global_batch_size": fits}
            if wanted >= seq_len
            else {"--train.max_tokens": step_tokens},
        )
    if train.max_steps is None:
        return by_tokens
    steps = _positive("--train.max_steps", train.max_steps, 1)
    unlimited = train.max_tokens == "auto" and train.epochs is None
    return steps if unlimited else min(steps, by_tokens)


def _warmup(train: StepArgs, total: int, earlier: Length | None) -> int:
    if train.lr_warmup_fraction is not None:
        if train.lr_warmup_steps != "auto":
            raise UserError(
                f"both lr_warmup_steps={train.lr_warmup_steps} and "
                f"lr_warmup_fraction={train.lr_warmup_fraction} are given. Give one of them.",
                fix={"--train.lr_warmup_fraction": None},
            )
        if not 0 <= train.lr_warmup_fraction < 1:
            raise UserError(
                f"lr_warmup_fraction={train.lr_warmup_fraction} is not in [0, 1). "
                "Give the share of the run that warms up.",
                fix={"--train.lr_warmup_fraction": 0.02},
            )
        return round(train.lr_warmup_fraction * total)
    if train.lr_warmup_steps == "auto":
        return earlier.warmup_steps if earlier else max(1, min(2000, total // 50))
    if train.lr_warmup_steps < 0:
        raise UserError(f"lr_warmup_steps={train.lr_warmup_steps} is negative. Use 0 or more.")
    if train.lr_warmup_steps >= total:
        raise UserError(
            f"lr_warmup_steps={train.lr_warmup_steps} is not shorter than the run ({total} steps): "
            "the learning rate would never reach its peak. Use a shorter warm-up or more tokens.",
            fix={"--train.lr_warmup_steps": max(1, total // 50) if total > 1 else 0},
        )
    return train.lr_warmup_steps


def _positive(option: str, value: int | str, auto: int) -> int:
    if value == "auto":
        return auto
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"{option} {value} is not a positive whole number. Use {auto}.", {option: auto}
        )
    return value

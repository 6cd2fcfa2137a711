"""Settings of what looks at a run, checked before anything is prepared."""

from __future__ import annotations

from gristmill.config.commands import Training
from gristmill.train.profile import window
from gristmill.util.errors import UserError


def check_watching(cfg: Training) -> None:
    """Raise UserError for settings of what looks at a run that contradict or lack each other."""
    window(cfg.profile, start_step=0, total_steps=1)
    given = cfg.eval
    if given.sample_prompt is None:
        _refuse_alone("sample_prompt", sample_interval=given.sample_interval)
        _refuse_alone("sample_prompt", sample_tokens=given.sample_tokens)
    if given.command is None:
        _refuse_alone("command", command_interval=given.command_interval)
    elif "{model}" not in given.command:
        raise UserError(
            f"--eval.command {given.command} does not say where the model goes. Write {{model}} "
            "in its place, as in --eval.command 'gristmill generate {model} --prompt Once'."
        )
    train = cfg.train
    if train.on_spike == "off":
        for name in ("spike_window", "spike_deviations"):
            if getattr(train, name) is not None:
                raise UserError(
                    f"--train.{name} says what a spike is, and --train.on_spike is off. Say what "
                    "to do about one.",
                    {"--train.on_spike": "skip"},
                )


def _refuse_alone(needed: str, **typed: object) -> None:
    for name, value in typed.items():
        if value not in ("auto", None):
            raise UserError(
                f"--eval.{name} {value} means nothing without --eval.{needed}. Give that too, or "
                "leave it out."
            )

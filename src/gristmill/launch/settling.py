"""The job of a training command's settings, whichever command it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.config.commands import Pretrain, Training

if TYPE_CHECKING:
    from gristmill.data.preparation.job import Executor
    from gristmill.train.job import Job


def settle(cfg: Training, prepare_with: Executor | None = None) -> Job:
    """What the command makes of these settings; `prepare_with` prepares raw text, unset: here."""
    if isinstance(cfg, Pretrain):
        from gristmill.train.settle import settle as settle_pretraining

        return settle_pretraining(cfg, prepare_with)
    from gristmill.finetune.settle import settle as settle_finetuning

    return settle_finetuning(cfg)

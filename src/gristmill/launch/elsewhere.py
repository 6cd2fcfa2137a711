"""Settings that are checked, and text that is prepared, here for workers on other machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.config.commands import RayWorkers, SlurmJob, Training
from gristmill.config.data import RawText
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from gristmill.data.preparation.job import Executor
    from gristmill.train.job import Job


def _check_shared(cfg: Training) -> None:
    """Refuse to prepare what lies on an object store into a cache that only this machine has."""
    from gristmill.data.storage import is_url

    data = getattr(cfg, "data", None)
    if not isinstance(data, RawText) or data.cache_dir is not None or cfg.num_nodes == 1:
        return
    if is_url(data.train_data_path):
        raise UserError(
            f"text at {data.train_data_path} would be prepared into this user's cache, which other "
            "machines may not see. Name a folder that all share with --data.cache_dir."
        )


def settle_elsewhere(
    cfg: Training, kind: str, prepare_with: Executor | None = None
) -> tuple[Job, Training]:
    """The job as this machine sees it, and the settings that workers with devices `kind` read.

    Every mistake that can be found here is, and raw text is prepared, before anything is started:
    by `prepare_with`, unset: by this machine.
    """
    import torch

    from gristmill.launch.settling import settle

    _check_shared(cfg)
    here = dataclasses.replace(cfg, device=kind)
    if kind == "cuda" and not torch.cuda.is_available():
        # A machine that only submits: what GPUs compute with is stood in for by name.
        precision = "bf16-mixed" if cfg.precision == "auto" else cfg.precision
        here = dataclasses.replace(cfg, device="cpu", precision=precision)
    job = settle(here, prepare_with)
    theirs = dataclasses.replace(
        job.cfg,
        device=kind,
        precision=cfg.precision,
        out_dir=str(job.out_dir.resolve()),
        launcher="auto",
        ray=RayWorkers(),
        slurm=SlurmJob(),
    )
    return job, theirs


def stamp(file: Path) -> tuple[int, int] | None:
    """Tells whether a file has been written since; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns

"""Where a training command runs: in this process, in several of this machine, or in a world."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.checkpoint.ranks import OtherRankError
from gristmill.config.commands import RayWorkers, SlurmJob, Training
from gristmill.config.parse import to_yaml
from gristmill.launch.local import run_workers
from gristmill.launch.worker import is_worker, run_as_worker
from gristmill.launch.world import World, join, outer_world
from gristmill.util.errors import RunError, UserError
from gristmill.util.reports import FAILED

if TYPE_CHECKING:
    from gristmill.train.job import Job

OTHERS_WAIT_S = 3.0
"""Before a rank repeats a mistake that the first rank has made too, and that ends them all."""


def train(cfg: Training) -> None:
    """Train as `cfg` says on the devices it asks for.

    A process that `torchrun`, `srun` or `mpirun` started joins its world. Otherwise one device is
    trained on in this process, and several in workers, which read the same settings from a file.
    """
    if is_worker():
        run_as_worker(lambda: _train(cfg, quiet=True))
        return
    world = outer_world()
    if world is not None:
        _train_in(world, cfg)
        return
    _refuse_settings_of_others(cfg)
    if cfg.launcher == "ray":
        from gristmill.launch.ray import train_on_ray

        train_on_ray(cfg)
        return
    if cfg.launcher == "slurm":
        from gristmill.launch.slurm import submit

        submit(cfg)
        return
    if cfg.num_nodes > 1:
        raise UserError(
            f"--num_nodes {cfg.num_nodes}: this command runs on one machine. Use --launcher slurm "
            "or ray, or start it on each, for example with torchrun --nnodes "
            f"{cfg.num_nodes} --nproc-per-node DEVICES -m gristmill {cfg.command} …",
            {"--launcher": "slurm"},
        )
    from gristmill.models.device import num_devices

    count = num_devices(cfg.devices, cfg.device)
    if count == 1:
        _train(cfg)
        return
    _train_here(cfg, count)


def _refuse_settings_of_others(cfg: Training) -> None:
    """Refuse what only another launcher has a use for."""
    for launcher, given, nothing in (
        ("ray", cfg.ray, RayWorkers()),
        ("slurm", cfg.slurm, SlurmJob()),
    ):
        names = [name for name, value in vars(given).items() if value != getattr(nothing, name)]
        if names and cfg.launcher != launcher:
            raise UserError(
                f"--{launcher}.{names[0]} is for --launcher {launcher}; this is {cfg.launcher}. "
                f"Leave it out, or add --launcher {launcher}.",
                {"--launcher": launcher},
            )


def _train(cfg: Training, *, quiet: bool = False) -> None:
    """The work of one rank; `quiet`: what is said of settings and data has been said."""
    from gristmill.launch.settling import settle
    from gristmill.train.fit import fit

    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        job = settle(cfg)
    fit(job)


def _train_here(cfg: Training, count: int) -> None:
    """Train in `count` workers of this machine.

    Text is prepared, and every mistake in the settings found, once and before any worker runs.
    """
    from gristmill.launch.settling import settle

    job = settle(cfg)
    before = _written(job)
    with tempfile.TemporaryDirectory(prefix="gristmill-") as folder:

        def command(attempt: int) -> Sequence[str]:
            settings = dataclasses.replace(job.cfg, out_dir=str(job.out_dir))
            if _written(job) != before:
                settings = _going_on(settings)
            file = Path(folder) / f"run-{attempt}.yaml"
            file.write_text(to_yaml(settings), encoding="utf-8")
            words = [*cfg.command.split(), "--config", str(file)]
            return [sys.executable, "-P", "-m", "gristmill", *words]

        run_workers(command, count, max_restarts=cfg.max_restarts)


def _train_in(world: World, cfg: Training) -> None:
    """Train as one rank of a world that somebody else has started, and perhaps starts again."""
    join(world)
    if world.attempt:
        cfg = _going_on(cfg)
    if world.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    try:
        _train(cfg)
    except UserError as error:
        if world.rank == 0:
            raise
        time.sleep(OTHERS_WAIT_S)
        raise UserError(f"rank {world.rank}: {error}", error.fix) from None
    except RunError as error:
        if world.rank == 0:
            raise
        raise RunError(f"rank {world.rank}: {error}") from None
    except OtherRankError as error:
        time.sleep(OTHERS_WAIT_S)
        _abandon(world, error)
    except (RuntimeError, OSError) as error:
        _abandon(world, error)


def _abandon(world: World, error: Exception) -> None:
    """End this rank for a reason that another attempt may not have, with the code for that.

    At once: threads of a process group whose other ranks are gone would be waited for.
    """
    what = f"{type(error).__name__}: {error}".rstrip(".")
    sys.stderr.write(
        f"error: rank {world.rank} of {world.size} failed ({what}). The same command goes on from "
        "the newest checkpoint.\n"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def _going_on(cfg: Training) -> Training:
    """The settings of an attempt after the first: what that has begun is neither deleted nor
    refused."""
    resume = "auto" if cfg.resume is False else cfg.resume
    return dataclasses.replace(cfg, overwrite=False, resume=resume)


def _written(job: Job) -> tuple[int, int] | None:
    """Tells whether the run's record has been written since."""
    from gristmill.train.directory import RUN_FILE

    try:
        found = (job.out_dir / RUN_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns

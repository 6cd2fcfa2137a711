"""Where a training command runs: in this process, in several of this machine, or in a world."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

from gristmill.config.commands import Pretrain
from gristmill.config.parse import to_yaml
from gristmill.launch.local import run_workers
from gristmill.launch.worker import die_with_parent, is_worker
from gristmill.launch.world import join, outer_world
from gristmill.util.errors import UserError


def pretrain(cfg: Pretrain) -> None:
    """Train as `cfg` says on the devices it asks for.

    A process that `torchrun`, `srun` or `mpirun` started joins its world. Otherwise one device is
    trained on in this process, and several in workers, which read the same settings from a file.
    """
    from gristmill.train.fit import pretrain as train
    from gristmill.train.settle import settle

    if is_worker():
        die_with_parent()
        train(cfg)
        return
    world = outer_world()
    if world is not None:
        join(world)
        train(cfg)
        return
    if cfg.num_nodes > 1:
        raise UserError(
            f"--num_nodes {cfg.num_nodes}: this command runs on one machine. Start it on each, "
            f"for example with torchrun --nnodes {cfg.num_nodes} --nproc-per-node DEVICES -m "
            "gristmill pretrain …"
        )
    count = num_devices(cfg)
    if count == 1:
        train(cfg)
        return
    # Text is prepared, and every mistake in the settings found, once and before any worker runs.
    job = settle(cfg)
    resolved = dataclasses.replace(cfg, out_dir=str(job.out_dir))
    with tempfile.TemporaryDirectory(prefix="gristmill-") as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(to_yaml(resolved), encoding="utf-8")
        command = [sys.executable, "-m", "gristmill", "pretrain", "--config", str(file)]
        run_workers(command, count, max_restarts=cfg.max_restarts)


def num_devices(cfg: Pretrain) -> int:
    """Processes on this machine: one for each device asked for; auto: all GPUs, or one."""
    import torch

    from gristmill.models.device import choose_device

    if choose_device(cfg.device).type != "cuda":
        return 1 if cfg.devices == "auto" else cfg.devices
    there = torch.cuda.device_count()
    if cfg.devices == "auto":
        return there
    if cfg.devices > there:
        raise UserError(
            f"--devices {cfg.devices}: this machine has {there}. Use at most that.",
            {"--devices": there},
        )
    return cfg.devices

"""Rank of world machines: each runs every world-th unit, the last to finish makes the dataset.

The machines share nothing but the output. Ranks start and end when they like; a rank that is run
again does what its earlier run left, and with another world the units are dealt out anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gristmill.util.errors import UserError


@dataclass(frozen=True)
class Array:
    """This process's place in the array, and how many processes it may start itself."""

    rank: int
    world: int
    num_workers: int


def mine(units: Sequence[int], settings: Array) -> list[int]:
    """The units of a rank: by their number, so that what others have done changes nothing."""
    return [unit for unit in units if unit % settings.world == settings.rank]


def place(
    rank: int | str, world: int | str, env: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Rank and world as given, those at `auto` from SLURM or Kubernetes.

    Raises UserError when they are not known or do not fit.
    """
    found = _from_scheduler(env)
    number = found[0] if isinstance(rank, str) else rank
    total = found[1] if isinstance(world, str) else world
    if number is None or total is None:
        missing = [n for n, v in (("--rank", number), ("--world", total)) if v is None]
        raise UserError(
            f"{' and '.join(missing)} cannot be told from the environment (SLURM_PROCID and "
            "SLURM_NTASKS, SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, JOB_COMPLETION_INDEX). "
            "give --rank R --world N, R from 0 to N - 1."
        )
    if not 0 <= number < total:
        raise UserError(
            f"--rank {number} is not in a --world of {total}. give 0 to {max(total, 1) - 1}, each "
            "once; an array with gaps needs both options."
        )
    return number, total


def _from_scheduler(env: Mapping[str, str]) -> tuple[int | None, int | None]:
    def number(name: str) -> int | None:
        value = env.get(name, "")
        return int(value) if value.isdecimal() else None

    rank: int | None = None
    world: int | None = None
    task, count = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT")
    if task is not None and count is not None:
        first, step = number("SLURM_ARRAY_TASK_MIN") or 0, number("SLURM_ARRAY_TASK_STEP") or 1
        rank, world = (task - first) // step, count
    process, tasks = number("SLURM_PROCID"), number("SLURM_NTASKS")
    if process is not None and tasks is not None:
        # Each job of an array may itself start several tasks with srun.
        rank = process if rank is None else rank * tasks + process
        world = tasks if world is None else world * tasks
    if rank is None:
        rank = number("JOB_COMPLETION_INDEX")
    return rank, world

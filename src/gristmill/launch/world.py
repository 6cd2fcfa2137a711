"""Whether somebody outside has started this process as one of several, and which one it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from gristmill.util.errors import UserError

# rank, world, rank on this machine; each launcher's own words, the most telling first.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
ATTEMPTS = ("GRISTMILL_ATTEMPT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Where the ranks of a SLURM job meet: a port that follows from the job's number."""


@dataclass(frozen=True)
class World:
    """What an outer launcher says of this process."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    attempt: int = 0
    """How often it has started this rank before."""


def outer_world(environment: Mapping[str, str] | None = None) -> World | None:
    """The world that `torchrun`, `srun` or `mpirun` put this process in, None outside of one.

    Several tasks of a SLURM job are a world only where `srun` started them: a batch script or a
    shell has the job's variables, too.
    """
    environment = os.environ if environment is None else environment
    for launcher, names in LAUNCHERS.items():
        rank, size, local = (environment.get(name) for name in names)
        if rank is None or size is None:
            continue
        attempt = next((environment[name] for name in ATTEMPTS if environment.get(name)), "0")
        world = World(launcher, int(rank), int(size), int(local or 0), int(attempt))
        if world.size > 1 or launcher == "torchrun":
            return world
    return None


def join(world: World, environment: MutableMapping[str, str] | None = None) -> None:
    """Put the words of `torchrun` into the environment, which all of torch reads.

    Raises UserError where the ranks have no address to meet at.
    """
    environment = os.environ if environment is None else environment
    environment["RANK"], environment["WORLD_SIZE"] = str(world.rank), str(world.size)
    environment["LOCAL_RANK"] = str(world.local_rank)
    if world.launcher == "torchrun":
        return
    if world.launcher == "srun":
        job = int(environment.get("SLURM_JOB_ID", "0"))
        address = environment.get("SLURM_LAUNCH_NODE_IPADDR") or _first_host(
            environment.get("SLURM_STEP_NODELIST", "127.0.0.1")
        )
        environment.setdefault("MASTER_ADDR", address)
        environment.setdefault("MASTER_PORT", str(FIRST_PORT + job % NUM_PORTS))
    elif environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world.size):
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(FIRST_PORT + os.getppid() % NUM_PORTS))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"{world.launcher} started {world.size} processes, and {' and '.join(missing)} say "
            "nothing of where they meet. Export MASTER_ADDR (the first machine) and MASTER_PORT."
        )


def _first_host(hosts: str) -> str:
    """The first machine of a SLURM list such as `node[03-07,9],gpu1`."""
    prefix, bracket, rest = hosts.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    return prefix + rest.split("]")[0].split(",")[0].split("-")[0]

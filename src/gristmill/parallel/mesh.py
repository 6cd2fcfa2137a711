"""The processes of a run, and which of them share what.

    axis        ranks along it hold                      and talk to each other
    replicate   the same weights, other rows             once a step (gradients)
    shard       other parts of weights, other rows       every block (weights, gradients)
    context     other positions of the same rows         every block (keys and values too)
    tensor      other parts of every product, same rows  every product

Outermost first: ranks along `tensor` are neighbours. Weights are cut over shard x context.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gristmill.config.sections import Parallel
from gristmill.util.errors import UserError

AXES = ("replicate", "shard", "context", "tensor")
RENDEZVOUS = "GRISTMILL_RENDEZVOUS"
"""Environment variable: a file in which the ranks of one machine meet, so that nothing listens."""
TIMEOUT_S = 600.0
"""How long a rank waits for the others."""


class Mesh:
    """This process among those of a run; `Mesh()` is one process alone."""

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        rank: int = 0,
        local_rank: int = 0,
        device_mesh: DeviceMesh | None = None,
        context: DeviceMesh | None = None,
        tokens: DeviceMesh | None = None,
    ) -> None:
        self.sizes = dict(sizes) if sizes is not None else dict.fromkeys(AXES, 1)
        self.rank, self.local_rank = rank, local_rank
        self.world = prod(self.sizes.values())
        self.device_mesh = device_mesh
        """Axes replicate, shard (x context) and tensor, on which parameters lie; None for one."""
        self.context = context
        """Ranks that share the positions of rows; None where this one has them all."""
        self.tokens = tokens
        """Ranks that hold other tokens, or None."""
        place, rest = {}, rank
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, self.sizes[axis])
        self.place = place
        """This rank's number along each axis."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the rows of a global batch this rank reads, of `data_world`."""
        return self.place["replicate"] * self.sizes["shard"] + self.place["shard"]

    @property
    def data_world(self) -> int:
        """Into how many shares the rows of a global batch are cut."""
        return self.sizes["replicate"] * self.sizes["shard"]

    @property
    def context_rank(self) -> int:
        """Which share of the positions of every row this rank computes, of `context_world`."""
        return self.place["context"]

    @property
    def context_world(self) -> int:
        """Into how many shares the positions of every row are cut."""
        return self.sizes["context"]

    @property
    def fsdp(self) -> DeviceMesh | None:
        """Where weights are cut: (replicate, shard), or shard alone; None where nowhere."""
        if self.device_mesh is None or self.world == self.sizes["tensor"]:
            return None
        hybrid = self.sizes["replicate"] > 1
        return self.device_mesh["replicate", "shard"] if hybrid else self.device_mesh["shard"]

    @property
    def tensor(self) -> DeviceMesh | None:
        """Ranks that share every product; None where this one makes them alone."""
        if self.device_mesh is None or self.sizes["tensor"] == 1:
            return None
        return self.device_mesh["tensor"]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks that hold other tokens, so that each counts once."""
        if self.tokens is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.tokens.get_group())
        return total

    def sum_rows(self, value: Tensor) -> Tensor:
        """The sum of an integer `value` over all ranks that hold other rows, each row once."""
        # Ranks along `context` hold the same rows.
        return self.sum(value) // self.sizes["context"]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; all get the same answer."""
        if self.device_mesh is None:
            return flag
        found = torch.tensor(int(flag), device=self._talking_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def main_says(self, value: Any) -> Any:
        """What rank 0 has for `value` (it is pickled), on every rank."""
        if self.device_mesh is None:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self._talking_device)
        return box[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.device_mesh is not None:
            self.any(False)

    @property
    def _talking_device(self) -> torch.device:
        """Small things are said over the CPU, which waits for no kernel of a GPU."""
        return torch.device("cpu")


def resolve_sizes(parallel: Parallel, world: int) -> dict[str, int]:
    """The size of each axis for `world` devices. Raises UserError where they do not multiply."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size != "auto" and size < 1:
            raise UserError(
                f"--parallel.{axis} {size} is not a positive whole number.",
                {f"--parallel.{axis}": 1},
            )
    others = prod(size for axis, size in sizes.items() if axis != "shard")
    if sizes["shard"] == "auto" and world % others == 0:
        sizes["shard"] = world // others
    if sizes["shard"] == "auto" or prod(sizes.values()) != world:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
        raise UserError(
            f"{asked} does not make {world} device{'s' if world > 1 else ''}. "
            "The sizes of --parallel multiply to the number of all devices: change them or "
            "--devices, and leave --parallel.shard auto.",
            {"--parallel.shard": "auto"} if world % others == 0 else None,
        )
    return sizes


def open_mesh(parallel: Parallel, device: torch.device, *, timeout_s: float = TIMEOUT_S) -> Mesh:
    """Join the run that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK).

    Ranks meet in the file that `GRISTMILL_RENDEZVOUS` names, else at MASTER_ADDR:MASTER_PORT. One
    process makes no process group. Raises UserError for sizes that do not fit the world.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    sizes = resolve_sizes(parallel, world)
    if world == 1:
        return Mesh(sizes)
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"{world} processes cannot train together on {device.type}. Use --devices 1."
        )
    if not dist.is_initialized():
        _join(rank, world, device, timeout_s)
    return build_mesh(sizes, rank, device, local_rank=int(os.environ.get("LOCAL_RANK", rank)))


def _join(rank: int, world: int, device: torch.device, timeout_s: float) -> None:
    """Make the process group: gloo for the CPU, and NCCL beside it for CUDA."""
    backend, extra = "gloo", {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, extra = "cpu:gloo,cuda:nccl", {"device_id": device}
    meeting = os.environ.get(RENDEZVOUS)
    if meeting:
        extra["store"] = dist.FileStore(meeting, world)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout, **extra)


def build_mesh(
    sizes: Mapping[str, int], rank: int, device: torch.device, *, local_rank: int = 0
) -> Mesh:
    """The mesh over a process group that is there already."""
    copies, shard, context, tensor = (sizes[axis] for axis in AXES)

    def grid(**axes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    main = grid(replicate=copies, shard=shard * context, tensor=tensor)
    tokens = None
    if copies > 1 and shard * context > 1:
        tokens = grid(tokens=copies * shard * context, tensor=tensor)["tokens"]
    elif copies * shard * context > 1:
        tokens = main["replicate" if copies > 1 else "shard"]
    return Mesh(
        sizes,
        rank=rank,
        local_rank=local_rank,
        device_mesh=main,
        context=grid(rows=copies * shard, context=context, tensor=tensor)["context"]
        if context > 1
        else None,
        tokens=tokens,
    )


def close_mesh(mesh: Mesh) -> None:
    """Leave the process group, if there is one."""
    if mesh.device_mesh is not None and dist.is_initialized():
        dist.destroy_process_group()

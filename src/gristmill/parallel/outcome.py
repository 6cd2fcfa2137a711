"""What became of something on every rank, told past the collectives that some may never join."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from gristmill.parallel.mesh import Mesh


def compare(
    mesh: Mesh, device: torch.device, name: str, said: str, wait_s: float
) -> tuple[dict[int, str], bool]:
    """What each rank says of its attempt at `name`, and whether all may go on together.

    That is so where all have spoken within `wait_s` and have come as far: each began as many
    collectives as the others, so that the next one of one is the next one of all. A name is used
    once. A rank that has not spoken is left out.
    """
    if mesh.world == 1:
        return {0: said}, True
    store = dist.PrefixStore(f"outcome/{name}", dist.distributed_c10d._get_default_store())
    place = [group._get_sequence_number_for_group() for group in _backends(mesh, device)]
    store.set(str(mesh.rank), json.dumps([said, place]))
    ranks = [str(rank) for rank in range(mesh.world)]
    try:
        store.wait(ranks, timedelta(seconds=wait_s))
    except RuntimeError:  # of the store: the time is over
        ranks = [rank for rank in ranks if store.check([rank])]
    heard = {int(rank): json.loads(store.get(rank)) for rank in ranks}
    together = len(heard) == mesh.world and all(theirs == place for _, theirs in heard.values())
    return {rank: words for rank, (words, _) in heard.items()}, together


def _backends(mesh: Mesh, device: torch.device) -> Iterator[Any]:
    """Who talks for this rank along each axis."""
    for axes in (mesh.device_mesh, mesh.tokens, mesh.context):
        for group in axes.get_all_groups() if axes is not None else ():
            yield group._get_backend(device)

"""The positions of every row shared by processes, for sequences that one cannot hold.

Each row is cut into 2 N pieces; process r of N computes pieces r and 2 N - 1 - r, so that all see
as many keys under the causal rule. Everything but attention takes each position on its own. In
attention every process has the queries of its positions and gathers the keys and values of all
(as in arXiv:2407.21783, section 3.3.2); a mask knows where each stands. Their gradients go back
to the process that made them.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gristmill.parallel.mesh import Mesh


def share_positions(model: nn.Module, mesh: Mesh) -> None:
    """Have a decoder compute this process's positions of the rows that it is given, when training.

    Every process along `context` gives it the same whole rows; its loss is the sum over its own
    positions.
    """
    if mesh.context is not None:
        model.sequence = Sequence(mesh.context)


class Sequence:
    """Which positions this process has, and how it comes by the others' keys and values.

    A `SequenceShard` to the decoder; to attention, what a cache is: it returns all that may be
    looked at.
    """

    start = 0

    def __init__(self, axis: DeviceMesh) -> None:
        self.axis, self.rank, self.world = axis, axis.get_local_rank(), axis.size()

    def positions(self, length: int, device: torch.device) -> Tensor:
        """This process's positions of rows of `length`, int64 [length / ranks]."""
        return _positions(length, self.rank, self.world, device)

    def key_positions(self, length: int, device: torch.device) -> Tensor:
        """The positions of what `append` returns, int64 [length]."""
        parts = [_positions(length, rank, self.world, device) for rank in range(self.world)]
        return torch.cat(parts)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, heads, positions, width] of all processes, one after the other."""
        return tuple(_gathered(part, self.axis) for part in new)


def _gathered(part: Tensor, axis: DeviceMesh) -> Tensor:
    whole = collectives.all_gather_single_autograd(part.contiguous(), 2, axis)
    return collectives.wait_tensor(whole)


@functools.lru_cache(maxsize=64)
def _positions(length: int, rank: int, world: int, device: torch.device) -> Tensor:
    assert length % (2 * world) == 0, f"{length} positions are not cut into {2 * world} pieces"
    piece = torch.arange(length // (2 * world), device=device)
    return torch.cat((piece + rank * len(piece), piece + (2 * world - 1 - rank) * len(piece)))

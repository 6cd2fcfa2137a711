"""The weights of a model whose parameters are spread over processes.

Build on the meta device, `parallelize`, `materialize`, then fill with `put`, one full parameter at
a time: no process ever holds the whole model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model on the meta device memory on `device`, without values."""
    model.to_empty(device=device)


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Store the full `value` in `parameter`: of one that is spread, this process's part.

    For `init_weights(..., put=put)` and `load_weights(..., put=put)`. No process talks to another.
    """
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    for dim, (start, size) in enumerate(zip(offset, shape)):
        value = value.narrow(dim, min(start, value.shape[dim]), size)
    parameter.to_local().copy_(value)

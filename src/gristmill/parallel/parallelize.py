"""The one ordered list of what is done to a freshly built decoder before training."""

from __future__ import annotations

import torch
from torch import nn

from gristmill.parallel.check import check_mesh
from gristmill.parallel.compile import compile_blocks, missing_for_compile
from gristmill.parallel.context import share_positions
from gristmill.parallel.mesh import Mesh
from gristmill.parallel.recompute import recompute as apply_recompute
from gristmill.parallel.shard import shard
from gristmill.parallel.tensor import share_products
from gristmill.util.errors import UserError


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    device: torch.device,
    *,
    compile: str = "auto",
    recompute: str | float = "none",
    precision: str = "32-true",
) -> str:
    """Make a decoder ready for these processes and this device, in place; says what was done.

    The model may be on the meta device: weights are filled in afterwards (see `weights.py`).
    Order matters: later items see what earlier ones made.
    """
    check_mesh(model.config, mesh.sizes)
    share_products(model, mesh)
    share_positions(model, mesh)
    apply_recompute(model, recompute)
    how = _compile(model, mesh, device, compile, recompute)
    if isinstance(recompute, float) and how.startswith("eager"):
        raise UserError(
            f"--recompute {recompute:g} needs compiled blocks, and this run is {how}. "
            "Use --recompute selective or full.",
            {"--recompute": "selective"},
        )
    if recompute != "none":
        how += f", recomputation {recompute}"
    shard(model, mesh, precision)
    return how


def _compile(
    model: nn.Module, mesh: Mesh, device: torch.device, wanted: str, recompute: str | float
) -> str:
    if wanted == "off":
        return "eager"
    missing = missing_for_compile(device)
    if missing is None and recompute == "full" and mesh.sizes["tensor"] > 1:
        # torch 2.13 may fail to hold a device mesh for such a backward pass.
        missing = "full recomputation beside tensor parallelism is not compiled"
    if missing is not None:
        return f"eager ({missing})"
    compile_blocks(model, device, sharded=mesh.fsdp is not None)
    return "compiled blocks"

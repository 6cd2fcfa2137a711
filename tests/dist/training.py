"""A few steps of training on any mesh, with everything that may be compared."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gristmill.config.model import ModelConfig
from gristmill.config.sections import AdamW, Parallel
from gristmill.formats.model_dir import load_weights
from gristmill.models.decoder import Decoder
from gristmill.models.device import weight_dtype
from gristmill.models.init import init_weights
from gristmill.optim.build import build_optimizer
from gristmill.parallel import gradients
from gristmill.parallel.mesh import Mesh, close_mesh, open_mesh
from gristmill.parallel.parallelize import parallelize
from gristmill.parallel.weights import materialize, put
from gristmill.train.method import Method

CPU = torch.device("cpu")
ROWS, LENGTH = 4, 32
EPS = 1e-4
"""Of AdamW; its own 1e-8 makes a full step of the rounding error of a gradient near nothing."""

TINY = ModelConfig(
    name="tiny",
    vocab_size=99,
    num_token_ids=97,
    max_seq_length=LENGTH,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
)


@dataclass
class Case:
    """What to train and how; `sizes` are those of `Parallel`."""

    config: ModelConfig = TINY
    sizes: dict[str, int] = field(default_factory=dict)
    micro_batch_size: int = 4
    steps: int = 1
    compile: str = "off"
    recompute: str | float = "none"
    precision: str = "32-true"
    documents: bool = False
    z_loss: float = 0.0
    max_norm: float = 0.5
    weights: Path | None = None
    method: Method | None = None
    """What is trained; unset: everything."""


@dataclass
class Result:
    """What came of it: full tensors, the same on every rank."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    how: str


def full(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks.

    Here and not by `full_tensor`, which fails where rows that are cut twice do not divide.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    _, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (start, tensor.detach().to_local()))
    whole = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
    for offset, part in parts:
        whole[tuple(slice(a, a + n) for a, n in zip(offset, part.shape))] = part
    assert not whole.isnan().any()
    return whole


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The full parameters by name."""
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def build(case: Case, mesh: Mesh) -> tuple[nn.Module, str]:
    """The decoder with its weights, on this mesh."""
    with torch.device("meta"):
        model = Decoder(case.config).to(weight_dtype(case.precision))
        if case.method is not None:
            case.method.adapt(model)
    how = parallelize(
        model,
        mesh,
        CPU,
        compile=case.compile,
        recompute=case.recompute,
        precision=case.precision,
    )
    materialize(model, CPU)
    if case.method is not None:
        settings = SimpleNamespace(seed=1)
        case.method.fill(
            model, SimpleNamespace(start_dir=case.weights, model=case.config, cfg=settings)
        )
    elif case.weights is not None:
        load_weights(model, case.weights, put=put)
    else:
        init_weights(model, 1, put=put)
    return model, how


def batch_of(step: int, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of a step: inputs, targets (some count nothing) and documents."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(0, case.config.token_ids, (ROWS, LENGTH + 1), generator=generator)
    targets = rows[:, 1:].clone()
    # Ranks have unequal numbers of targets, and one row has none at all in its first half.
    targets[0, : LENGTH // 2] = -100
    targets[1, -3:] = -100
    documents = None
    if case.documents:
        documents = (torch.rand((ROWS, LENGTH), generator=generator) < 0.1).cumsum(1).int()
    return rows[:, :-1], targets, documents


def train(case: Case) -> Result:
    """Train on the mesh that the environment describes."""
    mesh = open_mesh(Parallel(**case.sizes), CPU)
    model, how = build(case, mesh)
    result = Result([], [], parameters_of(model), {}, {}, how)
    optimizer = build_optimizer(model, AdamW(lr=1e-2, eps=EPS), CPU)
    for step in range(case.steps):
        inputs, targets, documents = batch_of(step, case)
        num_targets = int((targets != -100).sum())
        share = ROWS // mesh.data_world
        mine = range(mesh.data_rank * share, (mesh.data_rank + 1) * share)
        total = torch.zeros(())
        size = min(case.micro_batch_size, share)
        for start in range(mine.start, mine.stop, size):
            rows = slice(start, start + size)
            gradients.accumulate(model, last=start + size == mine.stop)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16-mixed"):
                loss = model(
                    inputs[rows],
                    targets[rows],
                    documents=None if documents is None else documents[rows],
                    z_loss=case.z_loss,
                )
            loss = loss / num_targets
            loss.backward()
            total += loss.detach()
        norm = gradients.total_norm(model)
        result.losses.append(mesh.sum(total).item())
        result.norms.append(norm.item())
        result.gradients |= {
            f"{step}/{name}": full(p.grad)
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        gradients.clip(model.parameters(), case.max_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
    result.weights = parameters_of(model)
    close_mesh(mesh)
    return result


def alone(case: Case) -> Result:
    """Train in this process alone."""
    saved = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = "1"
    try:
        return train(case)
    finally:
        if saved is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = saved

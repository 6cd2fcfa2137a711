"""One optimizer step: forward and backward over the micro-batches, clip, update."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gristmill.models.device import autocast, autocast_dtype
from gristmill.models.moe import move_biases
from gristmill.parallel.gradients import accumulate, clip, total_norm
from gristmill.parallel.mesh import Mesh
from gristmill.train.batch import MicroBatch, TokenBatch
from gristmill.train.job import Job
from gristmill.train.profile import section

ALONE = Mesh()


@dataclass
class StepStats:
    """What a step found. Loss is the mean over targets, in nats; norms are before clipping."""

    loss: float
    grad_norm: float
    finite: bool
    spike: bool = False
    """Whether the loss was above what was allowed, and the update left out for that."""


def reseed(seed: int, step: int, rank: int = 0) -> None:
    """Make randomness in a step a function of (seed, step, rank): it needs no saved state."""
    name = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    job: Job,
    mesh: Mesh = ALONE,
    most_loss: float = math.inf,
) -> StepStats:
    """Update the model once from `batch`; an update that is not finite is skipped on the device.

    So is one whose loss is above `most_loss`, a number that all ranks share.

    The loss is summed over targets and divided by their number in the whole batch, so that
    neither the micro-batch size nor padding changes the gradient. Of several ranks each gives its
    part of the batch, and all find the same.
    """
    total = torch.zeros((), device=batch.inputs.device)
    num_targets: int | Tensor = max(1, batch.num_targets)
    if mesh.world > 1:
        num_targets = torch.tensor(batch.num_targets, device=batch.inputs.device)
        num_targets = mesh.sum_rows(num_targets).clamp(min=1)
    visits: Tensor | None = None
    left = batch.num_micro_batches(job.micro_batch_size)
    for micro in batch.micro_batches(job.micro_batch_size):
        left -= 1
        accumulate(model, last=left == 0)
        total += micro_step(model, micro, num_targets, job)
        if model.visits is not None:
            visits = model.visits if visits is None else visits + model.visits
    with section("optimizer"):
        total = mesh.sum(total)
        norm = total_norm(model)
        finite = torch.isfinite(total) & torch.isfinite(norm)
        good = finite if most_loss == math.inf else finite & (total <= most_loss)
        update(optimizer, norm, good, job.cfg.train.max_norm)
        if visits is not None and job.bias_update_speed:
            move_biases(model, mesh.sum(visits), job.bias_update_speed * good)
        optimizer.zero_grad(set_to_none=True)
        is_finite = bool(finite.item())
        return StepStats(
            total.item(), norm.item(), is_finite, spike=is_finite and not bool(good.item())
        )


def micro_step(model: nn.Module, micro: MicroBatch, num_targets: int | Tensor, job: Job) -> Tensor:
    """Add one micro-batch's gradients; its share of the mean loss over `num_targets`."""
    inputs, targets, documents = micro
    with section("forward"), autocast(inputs.device, autocast_dtype(job.precision)):
        loss = model(inputs, targets, documents=documents, z_loss=job.cfg.train.z_loss)
        loss = loss / num_targets
    with section("backward"):
        loss.backward()
    return loss.detach()


def update(
    optimizer: torch.optim.Optimizer, norm: Tensor, finite: Tensor, max_norm: float | None
) -> None:
    """Step the optimizer with gradients scaled down to `max_norm`; not at all unless `finite`.

    Fused optimizers do both in their one pass over memory and without waiting for the host: they
    divide gradients by `grad_scale` and leave everything alone where `found_inf` is 1.
    """
    if optimizer.defaults.get("fused"):
        scale = None if max_norm is None else (norm.float() / max_norm).clamp(min=1.0)
        optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        if max_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip(parameters, max_norm, norm)
        optimizer.step()

"""Validation: the same samples in the same order every time, each once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from gristmill.parallel.mesh import Mesh
from gristmill.train.settle import Job
from gristmill.train.step import autocast


@torch.no_grad()
def validate(
    model: nn.Module,
    job: Job,
    mesh: Mesh,
    *,
    whole: bool,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss in nats per token over the validation set, or over its first batches.

    Nothing when `stopping` turns true on the way: who asked to leave does not wait for it.

    `val_bits_per_byte` is added where the text's bytes per token are known; it compares models
    with different tokenizers.
    """
    assert job.val is not None
    samples = job.val.num_samples
    if not whole:
        samples = min(samples, job.cfg.eval.max_iters * job.length.global_batch_size)
    model.eval()
    total, num_targets = 0.0, 0
    together = job.micro_batch_size * mesh.data_world
    for start in range(0, samples, together):
        if stopping():
            model.train()
            return {}
        rows = min(together, samples - start)
        batch = job.on_device(job.val.batch(start, rows, mesh.data_rank, mesh.data_world))
        for inputs, targets, documents in batch.micro_batches(job.micro_batch_size):
            with autocast(job.device, job.precision):
                total += model(inputs, targets, documents=documents).item()
        num_targets += batch.num_targets
    model.train()
    if mesh.world > 1:
        # Ranks that share the positions of rows have the same rows.
        sums = torch.tensor(
            [total, num_targets / mesh.context_world], dtype=torch.float64, device=job.device
        )
        total, num_targets = mesh.sum(sums).tolist()
    row = {"val_loss": total / max(1, num_targets)}
    if job.val_bytes_per_token:
        row["val_bits_per_byte"] = row["val_loss"] / math.log(2) / job.val_bytes_per_token
    return row

"""Validation: the same samples in the same order every time, each once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from gristmill.train.settle import Job
from gristmill.train.step import autocast


@torch.no_grad()
def validate(
    model: nn.Module, job: Job, *, whole: bool, stopping: Callable[[], bool] = lambda: False
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
    for start in range(0, samples, job.micro_batch_size):
        if stopping():
            model.train()
            return {}
        rows = min(job.micro_batch_size, samples - start)
        batch = job.on_device(job.val.batch(start, rows))
        for inputs, targets, documents in batch.micro_batches(job.micro_batch_size):
            with autocast(job.device, job.precision):
                total += model(inputs, targets, documents=documents).item()
        num_targets += batch.num_targets
    model.train()
    row = {"val_loss": total / max(1, num_targets)}
    if job.val_bytes_per_token:
        row["val_bits_per_byte"] = row["val_loss"] / math.log(2) / job.val_bytes_per_token
    return row

"""Validation: the same samples in the same order every time, each once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from gristmill.models.device import autocast, autocast_dtype
from gristmill.parallel.mesh import Mesh
from gristmill.train.job import Job


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
    with different tokenizers. Of several sources, each has its own numbers too, as
    `val_loss/<source>`.
    """
    assert job.val is not None
    model.eval()
    sources = max(1, len(job.val_sources))
    totals, targets = [0.0] * sources, [0] * sources
    together = job.micro_batch_size * mesh.data_world
    for source, first, last in _spans(job, whole=whole):
        for start in range(first, last, together):
            if stopping():
                model.train()
                return {}
            rows = min(together, last - start)
            batch = job.on_device(job.val.batch(start, rows, mesh.data_rank, mesh.data_world))
            for inputs, wanted, documents in batch.micro_batches(job.micro_batch_size):
                with autocast(job.device, autocast_dtype(job.precision)):
                    totals[source] += model(inputs, wanted, documents=documents).item()
            targets[source] += batch.num_targets
    model.train()
    sums = torch.tensor([totals, targets], dtype=torch.float64)
    if mesh.world > 1:
        # Ranks that share the positions of rows have the same rows.
        sums[1] /= mesh.context_world
        sums = mesh.sum(sums.to(job.device)).cpu()
    return _row(job, *sums.tolist())


def _spans(job: Job, *, whole: bool) -> list[tuple[int, int, int]]:
    """Which samples are read: source, first and last + 1.

    Not the whole set: the first ones of each source, as many as its share, a batch at least.
    """
    assert job.val is not None
    counts = [int(count) for count in job.val.source_samples()]
    some = job.cfg.eval.max_iters * job.length.global_batch_size
    spans, first = [], 0
    for source, count in enumerate(counts):
        taken = count
        if not whole and some < sum(counts):
            share = some * count // sum(counts)
            taken = min(count, max(share, job.length.global_batch_size))
        if taken:
            spans.append((source, first, first + taken))
        first += count
    return spans


def _row(job: Job, totals: list[float], targets: list[float]) -> dict[str, float]:
    """Metrics from the summed loss and the number of targets of each source."""
    row = {"val_loss": sum(totals) / max(1, sum(targets))}
    if job.val_bytes_per_token:
        row["val_bits_per_byte"] = row["val_loss"] / math.log(2) / job.val_bytes_per_token
    if len(job.val_sources) < 2:
        return row
    for (name, bytes_per_token), total, count in zip(job.val_sources, totals, targets, strict=True):
        if not count:
            continue
        row[f"val_loss/{name}"] = total / count
        if bytes_per_token:
            row[f"val_bits_per_byte/{name}"] = total / count / math.log(2) / bytes_per_token
    return row

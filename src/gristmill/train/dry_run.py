"""One step at full size before the run, in which nothing changes and every mistake shows."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gristmill.parallel.outcome import compare
from gristmill.train.job import Job
from gristmill.train.run import Run
from gristmill.train.step import micro_step, update
from gristmill.util.errors import UserError

COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
COMPILER, MEMORY = "compiler", "memory"
OTHERS_WAIT_S = 120.0
"""How long a rank whose step has failed waits for what the others say of theirs."""


def dry_run(run: Run) -> Job | None:
    """Try a step after compiling and allocating everything; None where it works.

    Else the job as it is to be tried on a model built anew: with half of an `auto` micro-batch
    that did not fit, or without a compiler that failed. Weights, moments and step counts stay as
    they are. Raises UserError for a typed micro-batch that does not fit. Several ranks do what one
    of them has to, where all have left the step at one place; else all end with a UserError, as
    those still in it wait for a rank that is gone.
    """
    job = run.job
    kind, reason = _attempt(job, run.model, run.optimizer)
    said, together = compare(
        run.mesh,
        job.device,
        f"{job.micro_batch_size} {job.compiles}",
        f"{kind} {reason}" if kind else "",
        OTHERS_WAIT_S if kind else run.timeout_s,
    )
    found = [words.partition(" ") for words in said.values() if words]
    if not found:
        silent = ", ".join(str(rank) for rank in range(run.mesh.world) if rank not in said)
        if not together:
            raise RuntimeError(f"rank {silent} has not made the dry run in {run.timeout_s:g} s")
        return None
    if reasons := [reason for kind, _, reason in found if kind == COMPILER]:
        if not together:
            raise UserError(
                f"torch.compile failed ({reasons[0]}). Train without it.", {"--compile": "off"}
            )
        run.console.note(f"torch.compile failed, training goes on without it: {reasons[0]}")
        return dataclasses.replace(job, compiles=False)
    half = job.micro_batch_size // 2
    what = f"micro_batch_size={job.micro_batch_size} with {job.length.seq_len} tokens"
    if job.cfg.train.micro_batch_size != "auto" or half == 0 or not together:
        raise UserError(
            f"{what} does not fit in the memory of {job.device}. Use a smaller micro-batch.",
            {"--train.micro_batch_size": max(1, half)},
        )
    run.console.note(f"{what} does not fit in the memory of {job.device}: trying {half}")
    run.micro_batch_size = half
    return dataclasses.replace(job, micro_batch_size=half)


def _attempt(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """What kind of failure a step ends with, and why; two empty words where it works."""
    try:
        _step(job, model, optimizer)
    except COMPILER_ERRORS as error:
        return COMPILER, (str(error).strip().splitlines() or [type(error).__name__])[0]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return MEMORY, ""
        raise
    return "", ""


def _is_out_of_memory(error: BaseException) -> bool:
    # torch has no class of its own for a CPU that has no more memory.
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)


def _step(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    batch = job.on_device(job.train.batch(0, job.micro_batch_size))
    targets = max(1, batch.num_targets)
    micro_step(model, next(batch.micro_batches(job.micro_batch_size)), targets, job)
    # A fused optimizer allocates its state before it finds that there is nothing to change.
    nothing, never = torch.zeros((), device=job.device), torch.tensor(False, device=job.device)
    update(optimizer, nothing, never, max_norm=None)
    optimizer.zero_grad(set_to_none=True)

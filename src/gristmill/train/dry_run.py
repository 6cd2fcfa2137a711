"""One step at full size before the run, in which nothing changes and every mistake shows."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gristmill.parallel.compile import uncompile_blocks
from gristmill.train.job import Job
from gristmill.train.run import Run
from gristmill.train.step import micro_step, update
from gristmill.util.errors import UserError

COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)


def dry_run(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> Job:
    """The job with a micro-batch that fits the device, after compiling and allocating everything.

    Weights, moments and step counts stay as they are. A typed micro-batch that does not fit is a
    UserError; an `auto` one is halved. A compiler that fails is left out, and a line says so;
    of several ranks all end with the option that helps, as their weights are half put together.
    """
    job = run.job
    while True:
        error = _attempt(job, model, optimizer)
        # A rank that fails alone would leave the others waiting: all do what one has to.
        uncompile, too_large = run.ranks.largest(
            isinstance(error, COMPILER_ERRORS), error is not None and _is_out_of_memory(error)
        )
        if error is not None and not (uncompile or too_large):
            raise error
        if not (uncompile or too_large):
            return job
        model.zero_grad(set_to_none=True)
        if uncompile:
            reason = str(error).strip().splitlines()[0] if error else "on another rank"
            if run.mesh.world > 1:  # weights that were being put together stay half way
                raise UserError(
                    f"torch.compile failed ({reason}). Train without it.", {"--compile": "off"}
                )
            uncompile_blocks(model)
            run.console.note(f"torch.compile failed, training goes on without it: {reason}")
            continue
        half = job.micro_batch_size // 2
        if job.cfg.train.micro_batch_size != "auto" or half == 0 or run.mesh.world > 1:
            raise UserError(
                f"micro_batch_size={job.micro_batch_size} with {job.length.seq_len} tokens "
                f"does not fit in the memory of {job.device}. Use a smaller micro-batch.",
                {"--train.micro_batch_size": max(1, half)},
            ) from None
        job = dataclasses.replace(job, micro_batch_size=half)
        run.micro_batch_size = half


def _attempt(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> Exception | None:
    try:
        _step(job, model, optimizer)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        return error
    return None


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

"""A training run, top to bottom: read this first.

settings ─ settle ─▶ job ─ build ─ resume ─ dry run ─▶ step · guard · validate · log · save
                                                                                  └─▶ final/
"""

from __future__ import annotations

import gc
import itertools
import time

import torch
from torch import nn

from gristmill.config.commands import Pretrain
from gristmill.models.decoder import Decoder
from gristmill.models.device import keep_freed_memory, weight_dtype
from gristmill.optim.build import build_optimizer
from gristmill.optim.schedules import lr_at
from gristmill.parallel.mesh import Mesh
from gristmill.parallel.parallelize import parallelize
from gristmill.parallel.weights import materialize
from gristmill.train.announce import announce
from gristmill.train.dry_run import dry_run
from gristmill.train.finish import finish, is_finished
from gristmill.train.guard import Guard
from gristmill.train.job import Job
from gristmill.train.profile import section
from gristmill.train.run import Run
from gristmill.train.settle import settle
from gristmill.train.step import reseed, train_step
from gristmill.train.throughput import Throughput
from gristmill.train.validate import validate


def pretrain(cfg: Pretrain) -> None:
    """Train a model as `cfg` says, or go on with the run that is in its directory."""
    fit(settle(cfg))


def fit(job: Job) -> None:
    """Make every step of the job that is left, and write the finished model directory."""
    with Run(job) as run:
        if is_finished(run):
            return
        make_ready(run)
        run.begin()
        job, mesh, model, optimizer = run.job, run.mesh, run.model, run.optimizer
        guard, speed = Guard(job.cfg.train), Throughput(job, mesh.world)
        if run.state.step == 0 and job.val and job.cfg.eval.initial_validation:
            run.log(validate(model, job, mesh, whole=False, stopping=run.stopping))
        while not run.done():
            run.before_step()
            started = time.perf_counter()
            reseed(job.cfg.seed, run.state.step, mesh.data_rank)
            lr = set_learning_rate(optimizer, job, run.state.step)
            with section("data"):
                run.rows = job.train.batch(
                    run.state.samples, job.length.global_batch_size, mesh.data_rank, mesh.data_world
                )
                batch = job.on_device(run.rows)
            data_wait_s = time.perf_counter() - started
            run.beat(f"computing step {run.state.step + 1:,}")
            stats = train_step(model, optimizer, batch, job, mesh, guard.most_loss(run))
            step_time_s = time.perf_counter() - started
            run.advance()
            if guard.check(stats, run):
                continue  # from an earlier checkpoint on
            row = {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": lr}
            row |= speed.row(run.state, run.step_tokens, step_time_s, data_wait_s)
            if run.validation_due():
                with section("validation"):
                    row |= validate(model, job, mesh, whole=run.complete(), stopping=run.stopping)
            run.log(row)
            run.call_hook(stats)
            if run.save_due() and not run.complete():  # `finish` saves the last step
                with section("save"):
                    run.save()
            run.after_step()
        finish(run)


def make_ready(run: Run) -> None:
    """Give the run its model and optimizer, filled, of which a step fits this device."""
    keep_freed_memory(run.job.device)
    for attempt in itertools.count():
        run.model, how = build(run.job, run.mesh)
        run.optimizer = build_optimizer(run.model, run.job.cfg.optimizer, run.job.device)
        if run.start_from is not None:
            run.load(run.start_from)
        if attempt == 0:
            announce(run, how)
        changed = dry_run(run)
        if changed is None:
            return
        # Anew, because weights that a step was putting together stay half way.
        run.job = changed
        del run.model, run.optimizer
        gc.collect()


def build(job: Job, mesh: Mesh) -> tuple[nn.Module, str]:
    """This rank's part of the decoder with fresh or given weights, and what was done to it.

    No rank ever holds the whole model. A checkpoint's weights come later.
    """
    with torch.device("meta"):
        model: nn.Module = Decoder(job.model).to(weight_dtype(job.precision))
        job.method.adapt(model)
    how = parallelize(
        model,
        mesh,
        job.device,
        compile=job.cfg.compile if job.compiles else "off",
        recompute=job.recompute,
        precision=job.precision,
    )
    materialize(model, job.device)
    job.method.fill(model, job)
    return model.train(), how


def set_learning_rate(optimizer: torch.optim.Optimizer, job: Job, step: int) -> float:
    """Give every group its share of the schedule at `step`; the schedule's own value."""
    lr = lr_at(
        step,
        peak=job.lr,
        min_lr=job.min_lr,
        warmup_steps=job.length.warmup_steps,
        total_steps=job.length.total_steps,
        schedule=job.cfg.train.schedule,
        decay_fraction=job.cfg.train.lr_decay_fraction,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr * group["peak_lr"] / job.lr
    return lr

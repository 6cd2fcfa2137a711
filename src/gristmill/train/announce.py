"""What a run says of itself before its first step."""

from __future__ import annotations

from gristmill.data.reading.corpus import MANY_EPOCHS
from gristmill.models.counts import num_parameters
from gristmill.models.device import describe
from gristmill.parallel.mesh import Mesh
from gristmill.track.console import count, duration
from gristmill.train.job import Job
from gristmill.train.run import Run


def announce(run: Run, how: str) -> None:
    """Show what is about to run; `how` says whether blocks are compiled."""
    job, length, state = run.job, run.job.length, run.state
    total = length.total_steps * length.global_batch_size
    batch = f"{length.global_batch_size} x {length.seq_len} tokens"
    if job.micro_batch_size != length.global_batch_size:
        batch += f", {job.micro_batch_size} at a time"
    steps = f"{length.total_steps:,}, {length.warmup_steps:,} of them warm-up"
    if state.step:
        steps += f"; going on after step {state.step:,}"
    if length.max_time_s is not None:
        steps += f"; at most {duration(length.max_time_s)}"
    run.console.start(
        {
            "run": job.out_dir,
            "model": f"{job.model.name}, {count(num_parameters(job.model))} parameters",
            "weights": _weights(run),
            **_trained(job),
            "device": f"{describe(job.device, job.precision)}, {how}",
            **_devices(run.mesh),
            "data": _data(job),
            **_packing(job),
            "tokens": f"{job.train.num_tokens(0, total):,}",
            "batch": batch,
            "steps": steps,
            "schedule": f"{job.cfg.train.schedule} from {job.lr:g} to {job.min_lr:g}",
        }
        | job.about
    )


def _trained(job: Job) -> dict[str, str]:
    """What is trained, where it is not everything."""
    if not job.method.name:
        return {}
    return {"trained": f"{job.method.name}: {count(job.method.num_saved(job.model))} parameters"}


def _weights(run: Run) -> str:
    """Where they come from."""
    job, start = run.job, run.start_from
    if start is None:
        return f"of {job.start_dir}" if job.start_dir else "random at the start"
    if job.method.trained_only:
        return f"of {job.start_dir}, and what was trained of them from {start}"
    return f"from {start}"


def _devices(mesh: Mesh) -> dict[str, str]:
    """How the devices share the work; nothing for one device."""
    sizes = [f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1]
    return {"devices": f"{mesh.world}: {', '.join(sizes)}"} if sizes else {}


def _data(job: Job) -> str:
    """Samples, how often each source will be read, and what is held out."""
    total = job.length.total_steps * job.length.global_batch_size
    read = dict(zip(job.source_names, job.train.epochs(total), strict=True))
    epochs = f"{read[job.source_names[0]]:,.2f} epochs"
    if len(read) > 1:
        epochs = "epochs: " + ", ".join(f"{name} {times:,.2f}" for name, times in read.items())
    text = f"{job.train.num_samples:,} samples, {epochs}; validation: "
    text += f"{job.val.num_samples:,} samples" if job.val else "none"
    often = [name for name, times in read.items() if times > MANY_EPOCHS]
    if often and len(read) > 1:
        text += f" (more than {MANY_EPOCHS} epochs of {', '.join(often)}: it may not pay)"
    return text


def _packing(job: Job) -> dict[str, str]:
    """What best-fit packing makes of each source; nothing when samples are not packed."""
    lines = []
    for name, packed in zip(job.source_names, job.train.packing, strict=False):
        line = f"{100 * packed.padding:.2f} % padding, {packed.cut:,} of {packed.documents:,} "
        line += f"documents ({100 * packed.cut_share:.2f} %) longer than a sample and cut"
        lines.append(line if len(job.source_names) == 1 else f"{name} {line}")
    return {"packing": "; ".join(lines)} if lines else {}

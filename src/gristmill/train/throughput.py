"""How fast a run is, in units that can be compared."""

from __future__ import annotations

from gristmill.models.counts import flops_per_token
from gristmill.models.device import memory_bytes, peak_flops
from gristmill.train.job import Job
from gristmill.train.run import State


class Throughput:
    """Measures steps of one job; the peak of the device is probed once."""

    def __init__(self, job: Job, world: int = 1) -> None:
        """Count the model's FLOPs and measure what this device can do at best, one of `world`."""
        self.job, self.world = job, world
        self.flops_per_token = flops_per_token(job.model, job.length.seq_len)
        self.peak = peak_flops(job.device, job.precision)

    def row(
        self, state: State, step_tokens: int, step_time_s: float, data_wait_s: float
    ) -> dict[str, float]:
        """Speed and memory of the step just made; `mfu` is left out when the peak is unknown."""
        tokens_per_s = step_tokens / step_time_s
        row = {
            "tokens_per_s": tokens_per_s,
            "step_time_s": step_time_s,
            "data_wait_s": data_wait_s,
            "memory_bytes": memory_bytes(self.job.device).peak,
            "epoch": state.samples / self.job.train.num_samples,
        }
        if len(self.job.source_names) > 1:
            epochs = self.job.train.epochs(state.samples)
            row |= {f"epoch/{n}": e for n, e in zip(self.job.source_names, epochs, strict=True)}
        if self.peak:
            row["mfu"] = tokens_per_s * self.flops_per_token / (self.peak * self.world)
        return row

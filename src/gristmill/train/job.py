"""A run with everything resolved: what the loop needs to know, whatever is trained on whatever."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gristmill.config.commands import Training
from gristmill.config.model import ModelConfig
from gristmill.data.reading.pack import PackSummary
from gristmill.data.reading.stream import Batch
from gristmill.models import counts
from gristmill.models.device import choose_device, host_memory_bytes, num_devices
from gristmill.parallel.mesh import resolve_sizes
from gristmill.train.batch import TokenBatch
from gristmill.train.directory import Record
from gristmill.train.length import Length
from gristmill.train.memory import fit_memory
from gristmill.train.method import Method
from gristmill.util.errors import RunError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Samples(Protocol):
    """What a run reads: a global order of samples, whose state is how many were consumed.

    `data.reading.stream.TokenStream` is the one of pretraining. All ranks see the same order, and
    get equally many rows of a batch.
    """

    seq_len: int

    @property
    def num_samples(self) -> int:
        """Samples of one pass over the data."""

    @property
    def packing(self) -> list[PackSummary]:
        """What packing makes of each source; empty where there is nothing to say."""

    def source_samples(self) -> NDArray[np.int64]:
        """Samples of each source."""

    def epochs(self, samples: int) -> list[float]:
        """How often each source has been gone through after so many samples."""

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on: equal fingerprints, equal order."""

    def num_tokens(self, samples: int, count: int) -> int:
        """Tokens that are trained on in the `count` samples after the first `samples`."""

    def batch(self, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's rows of the global batch that follows `samples` consumed ones."""


@dataclass(frozen=True)
class Job:
    """One training run, fully resolved; `cfg` keeps what the user typed."""

    cfg: Training
    model: ModelConfig
    device: torch.device
    precision: str
    tokenizer_dir: Path | None
    train: Samples
    source_names: tuple[str, ...]
    val: Samples | None
    val_bytes_per_token: float | None
    val_sources: tuple[tuple[str, float | None], ...]
    """Name and bytes per token of each source of the validation set."""
    length: Length
    micro_batch_size: int
    recompute: str | float
    document_mask: bool
    lr: float
    min_lr: float
    out_dir: Path
    identity: dict[str, Any]
    going_on: bool
    """Whether `out_dir` holds this very run."""
    exportable: bool
    """Whether `final/` can be written as a Hugging Face directory."""
    start_dir: Path | None = None
    """The model directory whose weights the run starts from; None: fresh ones."""
    method: Method = field(default_factory=Method)
    """What is trained of the model, and what the run leaves behind."""
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    """Texts of files that replace some of the tokenizer's, by name."""
    prompt_ids: Callable[[str], list[int]] | None = None
    """The ids that ask the model for an answer to a text; None: the text's own."""
    stop_ids: frozenset[int] | None = None
    """Ids that end an answer; None: the tokenizer's."""
    compiles: bool = True
    """Whether the compiler does what it is asked for; false where it was seen to fail."""
    most_samples: int | None = None
    """After so many samples some source has been read as often as it may be; None: no limit."""
    bias_update_speed: float = 0.0
    """How far the selection biases of experts move at every step; 0: they stay."""
    about: dict[str, str] = field(default_factory=dict)
    """Lines for the beginning of a run, in the place of those of the same name."""

    def on_device(self, batch: Batch) -> TokenBatch:
        """A batch of the stream as the model takes it."""
        return TokenBatch.of(batch, self.device, document_mask=self.document_mask)


def learning_rates(cfg: Training) -> tuple[float, float]:
    """Peak and last learning rate. Raises UserError where they cannot be."""
    lr = float(getattr(cfg.optimizer, "lr", 0.0))
    if not lr > 0:
        raise UserError(f"--optimizer.lr {lr} trains nothing. Use a value such as 0.001.")
    if cfg.train.min_lr == "auto":
        return lr, 0.1 * lr
    if not 0 <= cfg.train.min_lr <= lr:
        raise UserError(
            f"min_lr={cfg.train.min_lr} is not between 0 and the peak learning rate {lr}.",
            {"--train.min_lr": 0.1 * lr},
        )
    return lr, cfg.train.min_lr


def check_seq_len(typed: int, model: ModelConfig) -> None:
    """Raise UserError for a number of tokens that no sample of this model can have."""
    if typed < 1:
        raise UserError(
            f"--train.max_seq_length {typed} is not a positive whole number.",
            {"--train.max_seq_length": model.max_seq_length},
        )
    if typed > model.max_seq_length:
        raise UserError(
            f"max_seq_length={typed} is above the context of {model.name} "
            f"({model.max_seq_length} tokens). Use at most that.",
            {"--train.max_seq_length": model.max_seq_length},
        )


def micro_batch(
    cfg: Training,
    model: ModelConfig,
    precision: str,
    length: Length,
    record: Record | None,
    *,
    rows: int | None = None,
    kept_share: float = 1.0,
) -> tuple[int, str | float]:
    """Samples per forward pass: typed, the earlier run's, or the most that pays and fits.

    And the recomputation that they need. `rows`: as many as a batch has where samples share them;
    `kept_share`: weights, gradients and moments that are kept, of those of the whole model.
    """
    typed = cfg.train.micro_batch_size
    if typed != "auto" and typed < 1:
        raise UserError(f"--train.micro_batch_size {typed} is not a positive whole number.")
    given = record.micro_batch_size if record is not None else None
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or num_devices(cfg.devices, cfg.device))
    world = int(os.environ.get("WORLD_SIZE") or here * cfg.num_nodes)
    sizes = resolve_sizes(cfg.parallel, world)
    share = -(-(rows or length.global_batch_size) // (sizes["replicate"] * sizes["shard"]))
    spare_bytes = (1.0 - kept_share) * counts.state_bytes(model, precision, sizes)
    size, kind = fit_memory(
        model,
        seq_len=length.seq_len,
        most=share,
        precision=precision,
        budget_bytes=0.8 * _memory_bytes(choose_device(cfg.device), here) + spare_bytes,
        micro_batch=given if typed == "auto" else typed,
        recompute=cfg.recompute,
        mesh=sizes,
    )
    if rows is not None and typed == "auto" and given is None:
        size = -(-share // -(-share // size))  # equal parts: what fills the last one is wasted
    return size, kind


PROCESS_BYTES = 0.5e9
"""What a process on a CPU takes before it has a model: Python, torch, its compiler."""


def _memory_bytes(device: torch.device, processes: int) -> float:
    """What each of the machine's processes can have."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return host_memory_bytes() / processes - PROCESS_BYTES


def check_disk(job: Job) -> None:
    """Refuse a run whose checkpoints do not fit on the disk, before it starts."""
    width = 2 if job.precision == "bf16-true" else 4
    checkpoint = 3 * width * job.method.num_saved(job.model)
    # One more than is kept, for the one being written, and the finished model.
    model = width * counts.num_parameters(job.model)
    needed = (job.cfg.train.keep_last + 1) * checkpoint + model
    existing = job.out_dir
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    already = sum(p.stat().st_size for p in job.out_dir.rglob("*.safetensors"))
    if needed > free + already:
        raise RunError(
            f"no space left for this run in {job.out_dir}: it needs {needed / 1e9:.1f} GB "
            f"({job.cfg.train.keep_last} checkpoints of {checkpoint / 1e9:.2f} GB kept, one being "
            f"written, and the model), {free / 1e9:.1f} GB are free. Free some, choose another "
            "--out_dir, or keep fewer with --train.keep_last 2."
        )

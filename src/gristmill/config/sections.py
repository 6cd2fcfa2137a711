"""The option groups that commands share. Docstrings are the help texts; no torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Auto = Literal["auto"]
Precision = Literal["bf16-mixed", "bf16-true", "32-true"]


@dataclass(kw_only=True)
class StepArgs:
    """Length, batches and schedule of training. `auto` fits the run; a typed value is checked."""

    max_tokens: int | Auto = "auto"
    """Stop after this many tokens; auto: one epoch, or as max_steps or epochs say."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    max_time: str | None = None
    """Stop after this much training time, as 90s, 30m or 2h, all restarts together, if sooner."""
    epochs: float | None = None
    """Stop after this many passes over the training set."""
    global_batch_size: int | Auto = "auto"
    """Samples per optimizer step over all devices; auto: fits length of the run."""
    micro_batch_size: int | Auto = "auto"
    """Samples per forward pass on a device; auto: the largest power of two that a dry run fits."""
    max_seq_length: int | Auto = "auto"
    """Tokens per sample; auto: the model's context, or less where the documents are shorter."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: cosine, warm-up-stable-decay, linear or constant."""
    lr_warmup_steps: int | Auto = "auto"
    """Steps of linear warm-up; auto: 2 % of the run, at least one step, at most 2,000."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the run, instead of steps."""
    lr_decay_fraction: float = 0.2
    """Share of the run that the wsd schedule decays over."""
    min_lr: float | Auto = "auto"
    """Learning rate at the end of the schedule; auto: a tenth of the peak."""
    max_norm: float | None = 1.0
    """Gradient norm to clip to; null: no clipping."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser added to the loss; 0: off."""
    save_interval: int | Auto = "auto"
    """Steps between checkpoints; auto: a tenth of the run, at most 1,000. Also every 10 minutes."""
    keep_last: int = 3
    """How many checkpoints stay on disk; at least 2."""
    keep_every: int | None = None
    """Also keep checkpoints whose step is a multiple of this."""
    log_interval: int = 1
    """Steps between rows of metrics."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient, or a spike."""
    on_spike: Literal["off", "skip", "rewind", "stop"] = "off"
    """A loss far above the last ones: leave its update out, go back to the last checkpoint and on
    with other data, or stop."""
    spike_window: int | None = None
    """Losses that a spike is measured against; unset: 100."""
    spike_deviations: float | None = None
    """Standard deviations above their mean that make a spike; unset: 6."""


@dataclass(kw_only=True)
class TrainArgs(StepArgs):
    """Length, batches and schedule of pretraining, and how text becomes samples."""

    document_mask: bool | Auto = "auto"
    """Keep attention and positions inside documents; auto: for datasets that gristmill prepared."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Samples: text cut every max_seq_length tokens, or rows of whole documents and padding."""
    batch_order: Literal["locality", "spread"] = "locality"
    """Which rows of a batch a device reads: those of neighbouring chunks, or a random share."""
    bias_update_speed: float | None = None
    """How far the bias of each expert's choice moves towards even loads at every step, in models
    that have one (DeepSeek-V3, arXiv:2408.15664); unset: 0.001."""
    tie_embeddings: bool | None = None
    """Share input embedding and output head; unset: as the model defines it."""


@dataclass(kw_only=True)
class EvalArgs:
    """Validation during training: always the same samples, every one once."""

    interval: int | Auto = "auto"
    """Steps between validations; auto: a tenth of the run, at most 1,000 steps."""
    max_iters: int = 100
    """Batches (of the global batch size) per validation at intervals."""
    initial_validation: bool = True
    """Validate before the first step."""
    final_validation: bool = True
    """Validate on the whole validation set after the last step."""
    sample_prompt: str | list[str] | None = None
    """Text that the model continues at intervals, or a list of texts."""
    sample_interval: int | Auto = "auto"
    """Steps between samples of text; auto: as interval."""
    sample_tokens: int | None = None
    """Tokens of a sample; unset: 64."""
    command: str | None = None
    """Command for a shell, run beside training on new checkpoints: {model} becomes a directory with
    the weights, {step} the step. What it writes goes to out_dir/eval."""
    command_interval: int | Auto = "auto"
    """Steps between starts of the command; auto: at every train.save_interval."""


@dataclass(kw_only=True)
class Parallel:
    """How devices share the work; the four numbers multiply to the number of all devices."""

    shard: int | Auto = "auto"
    """Parts that weights, gradients and moments are cut into; auto: all devices that are left."""
    replicate: int = 1
    """Copies of the sharded model that only average gradients, such as one for each machine."""
    tensor: int = 1
    """Devices that share every matrix product, best within a machine."""
    context: int = 1
    """Devices that share the positions of every sequence, for long ones."""


@dataclass(kw_only=True)
class LogArgs:
    """Names for trackers that group runs; refused where no chosen tracker has a use for them."""

    project: str | None = None
    """Project (wandb, trackio) or experiment (mlflow); unset: gristmill."""
    run: str | None = None
    """Run name (wandb, mlflow, trackio); unset: the run directory's name."""
    group: str | None = None
    """Group of runs (wandb, trackio)."""


class Optimizer:
    """Base of the optimizer settings; one of your own is named as `--optimizer module:Class`.

    A class of your own has `lr` and a method `build(self, model)` that returns a torch optimizer.
    """


@dataclass(kw_only=True)
class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101). Matrices decay; norms, biases and embeddings do not."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""


@dataclass(kw_only=True)
class Muon(Optimizer):
    """Muon (arXiv:2502.16982) for the matrices of the blocks, each expert's apart; AdamW for the
    embeddings, head, router, norms and biases."""

    lr: float = 1e-3
    """Peak learning rate; with match_rms_adamw one that suits AdamW."""
    adamw_lr: float | None = None
    """Peak learning rate of the AdamW part; unset: lr."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices, in both parts."""
    momentum: float = 0.95
    """Decay rate of Muon's momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Length of updates: as AdamW's, 0.2 sqrt(max(out, in)), or sqrt(max(1, out / in))."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""

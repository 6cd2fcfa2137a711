"""The options of `gristmill finetune …`. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gristmill.config.commands import Training, WeightType
from gristmill.config.sections import AdamW, Auto, Optimizer, StepArgs
from gristmill.config.tuning_data import TuningData


@dataclass(kw_only=True)
class TuneArgs(StepArgs):
    """Length, batches and schedule of finetuning. A sample is a record: a prompt and its answer,
    or a whole conversation."""

    max_tokens: int | Auto = "auto"
    """Stop after this many tokens; auto: as epochs or max_steps say."""
    epochs: float | None = None
    """Stop after this many passes over the records; unset: 3, unless max_steps or max_tokens
    say how long."""
    global_batch_size: int | Auto = "auto"
    """Records per optimizer step over all devices; auto: 16, fewer where there are few."""
    micro_batch_size: int | Auto = "auto"
    """Rows per forward pass on a device at most; auto: as many as fit, in equal parts."""
    max_seq_length: int | Auto = "auto"
    """Tokens of a row; longer records are cut; auto: the longest record, at most the model's
    context."""
    packing: bool = True
    """Put several records of a batch into a row, kept apart by masks; false: one a row. What is
    learned is the same."""


def _adamw(lr: float) -> AdamW:
    return AdamW(lr=lr, weight_decay=0.0, betas=(0.9, 0.999))


@dataclass(kw_only=True)
class FinetuneSubject:
    """What is trained, and on what."""

    checkpoint_dir: str | None = None
    """Model directory of any kind whose weights the run starts from; the first word after the
    command. `initial_checkpoint_dir` is accepted too."""
    data: TuningData | None = None
    """What to train on: JSON (Alpaca-style records or chats in a file of yours), Alpaca, Alpaca2k,
    AlpacaGPT4, Dolly, LIMA, FLAN, Deita, LongForm, or module:Class."""
    tokenizer_dir: str | None = None
    """Directory of the tokenizer; unset: the model's own."""


@dataclass(kw_only=True)
class Finetune(Training, FinetuneSubject):
    """What every way to finetune has."""

    train: TuneArgs = field(default_factory=TuneArgs)


@dataclass(kw_only=True)
class FinetuneFull(Finetune):
    """Train all weights of a model on instructions or chats; interrupted runs continue."""

    command: ClassVar[str] = "finetune full"

    optimizer: Optimizer = field(default_factory=lambda: _adamw(2e-5))
    """Optimizer and its learning rate."""


@dataclass(kw_only=True)
class FinetuneLora(Finetune):
    """Train a low-rank addition to some matrices of a model (LoRA, arXiv:2106.09685)."""

    command: ClassVar[str] = "finetune lora"

    optimizer: Optimizer = field(default_factory=lambda: _adamw(2e-4))
    """Optimizer and its learning rate."""
    lora_r: int = 8
    """Rank of the addition."""
    lora_alpha: int = 16
    """The addition is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Share of the addition's inputs that is left out in training."""
    lora_query: bool = True
    """Add to the queries' matrices."""
    lora_key: bool = False
    """Add to the keys' matrices."""
    lora_value: bool = True
    """Add to the values' matrices."""
    lora_projection: bool = False
    """Add to the attention's output matrices."""
    lora_mlp: bool = False
    """Add to the feed-forward matrices."""
    lora_head: bool = False
    """Add to the output head."""
    lora_dora: bool = False
    """Train the length of each row apart from its direction (DoRA, arXiv:2402.09353)."""


@dataclass(kw_only=True)
class FinetuneAdapter(Finetune):
    """Train a prefix of every upper layer's attention (LLaMA-Adapter, arXiv:2303.16199)."""

    command: ClassVar[str] = "finetune adapter"

    optimizer: Optimizer = field(default_factory=lambda: _adamw(1e-3))
    """Optimizer and its learning rate."""
    adapter_prompt_length: int = 10
    """Learned positions that each layer's attention sees before the text."""
    adapter_start_layer: int = 2
    """First layer that has them, counted from 0."""


@dataclass(kw_only=True)
class Merge:
    """Write an adapter and its base as one ordinary model, and compare what was written."""

    checkpoint_dir: str | None = None
    """The adapter: PEFT's directory, a checkpoint of `finetune lora`, or LitGPT's directory with
    lit_model.pth.lora; the first word after the command."""
    output_dir: str | None = None
    """Directory to write, which must not exist or be empty; the second word after the command.
    Unset: merged-NAME beside the adapter; LitGPT's is merged in its place, as LitGPT does."""
    pretrained_checkpoint_dir: str | None = None
    """The base; unset: the one that the adapter names."""
    format: Literal["hf", "litgpt"] = "hf"
    """Who reads it: transformers and its like (hf), or LitGPT."""
    dtype: WeightType | Auto = "auto"
    """Type of the weights; auto: the base's."""
    precision: Literal["auto", "32-true", "bf16-true", "16-true"] = "auto"
    """LitGPT's word for dtype."""
    tokenizer_dir: str | None = None
    """Tokenizer that goes along; unset: the adapter's or the base's own."""
    overwrite: bool = False
    """Replace what output_dir holds, once the new is complete."""

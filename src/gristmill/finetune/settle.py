"""Settings of `gristmill finetune` to a job: every check passed before anything is written.

settings ─ model ─ tokenizer ─ records ─ run directory ─ length ─▶ Job
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from gristmill.config.finetune import Finetune, TuneArgs
from gristmill.config.model import ModelConfig
from gristmill.config.parse import to_dict
from gristmill.config.tuning_data import Records
from gristmill.finetune.examples import Examples, check_ids, encode, encode_one, on_the_day
from gristmill.finetune.methods import method_of
from gristmill.finetune.records import Conversation, with_inputs_inline
from gristmill.finetune.samples import HeldOutRows, RecordSamples
from gristmill.finetune.sources import Found, find_conversations
from gristmill.finetune.templates import OWN, choose_template
from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.tokenizer_files import load_tokenizer
from gristmill.infer.load import model_name
from gristmill.models import counts
from gristmill.models.check import check_config
from gristmill.models.device import choose_device, resolve_precision
from gristmill.tokenizer.chat import encode_chat
from gristmill.tokenizer.prompt_styles import kind_of
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.train import directory
from gristmill.train.job import Job, check_disk, check_seq_len, learning_rates, micro_batch
from gristmill.train.length import Length, plan_length
from gristmill.train.method import Method
from gristmill.train.settle import check_settings, is_exportable
from gristmill.util.errors import UserError
from gristmill.util.paths import resolve_model_dir

DEFAULT_EPOCHS, DEFAULT_BATCH = 3.0, 16
EXAMPLE_WIDTH = 64
"""Rows as long as the longest record are made a multiple of this."""


@dataclass(frozen=True)
class _Text:
    """The records of a run as ids, and what they were made with."""

    tokenizer: Tokenizer
    style: str
    found: Found
    train: Examples
    val: Examples

    @property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return int(max(part.lengths.max(initial=0) for part in (self.train, self.val)))


def settle(cfg: Finetune) -> Job:
    """The job that these settings mean. Raises UserError for settings that cannot work."""
    data = _refuse_what_is_not_there(cfg)
    check_settings(cfg)
    assert cfg.checkpoint_dir is not None
    method = method_of(cfg)
    source = open_model_dir(cfg.checkpoint_dir)
    model = source.config
    check_config(model)
    method.check(model)
    source.tensors()
    device = choose_device(cfg.device)
    precision = resolve_precision(cfg.precision, device)
    lr, min_lr = learning_rates(cfg)
    text = _text(cfg, data, model)
    out_dir, record, wanted = _place(cfg, model, text, data.mask_prompt, precision)
    earlier = record.length if record else None
    seq_len = _seq_len(cfg, model, text, earlier)
    samples, val = _samples(cfg, text, seq_len, model.max_seq_length)
    length = _length(cfg, samples, seq_len, earlier)
    rows = samples.usual_rows(length.global_batch_size)
    kept = _share_of_state(method, model)
    micro, recompute = micro_batch(
        cfg, model, precision, length, record, rows=rows, kept_share=kept
    )
    job = Job(
        cfg=cfg,
        model=model,
        device=device,
        precision=precision,
        tokenizer_dir=text.tokenizer.path.parent,
        train=samples,
        source_names=(text.found.name,),
        val=val if val.num_samples else None,
        val_bytes_per_token=None,
        val_sources=((text.found.name, None),),
        length=length,
        micro_batch_size=micro,
        recompute=recompute,
        document_mask=True,
        lr=lr,
        min_lr=min_lr,
        out_dir=out_dir,
        identity=wanted,
        going_on=record is not None,
        exportable=is_exportable(model, refuse=False),
        start_dir=resolve_model_dir(cfg.checkpoint_dir),
        method=method,
        tokenizer_files=_tokenizer_files(text),
        prompt_ids=partial(ask, text.tokenizer),
        stop_ids=_stop_ids(text.tokenizer),
        about=_about(text, samples, val, length, rows),
    )
    check_disk(job)
    return job


def _refuse_what_is_not_there(cfg: Finetune) -> Records:
    """The data module; UserError where it or the model is missing."""
    if cfg.checkpoint_dir is None:
        raise UserError(
            "no model to finetune. Name a model directory of any kind, for example "
            f"`gristmill {cfg.command} out/quickstart/run --data JSON --data.json_path FILE`."
        )
    if cfg.data is None:
        raise UserError(
            "no data to train on. Give records of your own by --data JSON --data.json_path FILE, "
            "or a known set such as --data Alpaca2k.",
        )
    if not isinstance(cfg.data, Records):
        kind = type(cfg.data)
        raise UserError(
            f"--data {kind.__module__}:{kind.__qualname__} does not have the options of finetuning "
            "data. Derive it from gristmill.config.tuning_data.Records."
        )
    return cfg.data


def _text(cfg: Finetune, data: Records, model: ModelConfig) -> _Text:
    """The records as ids; the cheap mistakes first, then files, then the tokenizer's work."""
    assert cfg.checkpoint_dir is not None
    if cfg.tokenizer_dir is not None:
        tokenizer = Tokenizer.load(cfg.tokenizer_dir)
    else:
        tokenizer = load_tokenizer(cfg.checkpoint_dir)
    style, template = choose_template(data.prompt_style, tokenizer)
    tokenizer.chat_template = template
    found = find_conversations(data)
    parts = []
    for talks in (found.train, found.val):
        told: list[Conversation] = talks
        # LitGPT's styles, which a checkpoint may bring along, have a place for inputs.
        if style == OWN and kind_of(template, tokenizer.bos_token) is None:
            told = [with_inputs_inline(talk) for talk in talks]
        examples = encode(told, tokenizer, mask_prompt=data.mask_prompt)
        check_ids(examples, model.vocab_size, tokenizer)
        parts.append(examples)
    return _Text(tokenizer, style, found, *parts)


def _place(
    cfg: Finetune, model: ModelConfig, text: _Text, mask_prompt: bool, precision: str
) -> tuple[Any, directory.Record | None, dict[str, Any]]:
    """The run's directory, what it holds of this very run, and what makes the run that run."""
    digest = f"{text.train.digest[:16]} {text.val.digest[:16]}"
    wanted = directory.identity(
        cfg, to_dict(model), digest, precision, start=cfg.checkpoint_dir
    ) | {
        "command": cfg.command,
        # What makes digests differ, for whoever is told that they do.
        "data.records": f"{len(text.train):,}, {len(text.val):,} held out",
        "data.prompt_style": text.style,
        "data.mask_prompt": mask_prompt,
    }
    own = ("lora_", "adapter_")
    wanted |= {name: value for name, value in to_dict(cfg).items() if name.startswith(own)}
    how = cfg.command.rpartition(" ")[2]
    name = model.name
    if name == ModelConfig().name:  # files that do not say what they are
        name = model_name(resolve_model_dir(cfg.checkpoint_dir or "")).partition("/")[0]
    out_dir, record = directory.find(cfg, wanted, f"{name.lower()}-{how}-{text.found.name}")
    return out_dir, record, wanted


def _seq_len(cfg: Finetune, model: ModelConfig, text: _Text, earlier: Length | None) -> int:
    """Tokens of a row: typed and checked, or as many as the longest record has."""
    typed = cfg.train.max_seq_length
    if typed == "auto":
        if earlier is not None:
            return earlier.seq_len
        wanted = -(-max(1, text.longest - 1) // EXAMPLE_WIDTH) * EXAMPLE_WIDTH
        return min(model.max_seq_length, wanted)
    check_seq_len(typed, model)
    return typed


def _samples(
    cfg: Finetune, text: _Text, seq_len: int, context: int
) -> tuple[RecordSamples, HeldOutRows]:
    """What is trained on and what is held out, cut to rows. UserError where nothing is left."""
    assert isinstance(cfg.data, Records)
    train, val = text.train.cut(seq_len + 1), text.val.cut(seq_len + 1)
    if not len(train):
        raise UserError(
            f"nothing is left to learn: none of the {len(text.train):,} records has a part of its "
            f"answer within its first {seq_len + 1} tokens. "
            + (
                "Use longer rows."
                if seq_len < context
                else "The model's context is no longer: shorten the prompts."
            ),
            {"--train.max_seq_length": min(context, text.longest)} if seq_len < context else None,
        )
    return (
        RecordSamples(train, seq_len, seed=cfg.data.seed, packing=cfg.train.packing),
        HeldOutRows(val, seq_len),
    )


def _length(cfg: Finetune, samples: RecordSamples, seq_len: int, earlier: Length | None) -> Length:
    """The run's extent: a sample is a record, of as many tokens as records have on average."""
    train: TuneArgs = cfg.train
    if train.epochs is None and train.max_steps is None and train.max_tokens == "auto":
        train = dataclasses.replace(train, epochs=DEFAULT_EPOCHS)
    if train.global_batch_size == "auto" and earlier is None:
        batch = min(DEFAULT_BATCH, samples.num_samples)
        if train.micro_batch_size != "auto":
            batch = max(batch, train.micro_batch_size)
        train = dataclasses.replace(train, global_batch_size=batch)
    mean = max(1, round(samples.num_tokens(0, samples.num_samples) / samples.num_samples))
    length = plan_length(
        train, cfg.eval, seq_len=mean, num_samples=samples.num_samples, earlier=earlier
    )
    return dataclasses.replace(length, seq_len=seq_len)


def _share_of_state(method: Method, model: ModelConfig) -> float:
    """Memory for weights, gradients and moments, relative to training the whole model."""
    if not method.trained_only:
        return 1.0
    trained = method.num_saved(model) / counts.num_parameters(model)
    return min(1.0, (1 + 3 * trained) / 4)


def ask(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that ask for an answer, the same on every day as those of the records."""
    turns = [{"role": "user", "content": prompt}]
    return encode_chat(tokenizer, turns, add_generation_prompt=True, **on_the_day())


def _stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's ids that end a text, and the control token that ends an answer."""
    talk = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    try:
        ids, learned = encode_one(talk, tokenizer, mask_prompt=True)
    except UserError:  # a template for other conversations than this one
        return frozenset(tokenizer.stop_ids)
    special = {tokenizer.backend.special[text] for text in tokenizer.special_tokens}
    ends = {i for i, answer in zip(ids, learned, strict=True) if answer} & special
    return frozenset(tokenizer.stop_ids) | ends


def _tokenizer_files(text: _Text) -> dict[str, str]:
    """What the finished model needs for others to prompt it as it was trained."""
    if text.style == OWN:
        return {}
    assert text.tokenizer.chat_template is not None
    return {"chat_template.jinja": text.tokenizer.chat_template}


def _about(
    text: _Text, samples: RecordSamples, val: HeldOutRows, length: Length, rows: int
) -> dict[str, str]:
    """What is told of the data where the run begins."""
    width = length.seq_len + 1
    lengths = [*text.train.lengths.tolist(), *text.val.lengths.tolist()]
    cut = sum(tokens > width for tokens in lengths)
    lost = len(lengths) - samples.num_samples - len(val.examples)
    passes = length.total_steps * length.global_batch_size / samples.num_samples
    words = f"{samples.num_samples:,} records, {passes:.2f} epochs; held out: "
    words += f"{len(val.examples):,} records" if len(val.examples) else "none"
    notes = []
    if cut:
        notes.append(f"{cut:,} longer than {width:,} tokens and cut")
    if lost:
        notes.append(f"{lost:,} left out because nothing of their answers is within that")
    if text.found.skipped.count:
        first = text.found.skipped.reasons[0]
        notes.append(f"{text.found.skipped.count:,} unusable and left out ({first})")
    learned = int(samples.examples.learned.sum())
    share = learned / max(1, len(samples.examples.learned))
    style = "the model's own chat template" if text.style == OWN else text.style
    batch = f"{length.global_batch_size} records in about {rows} rows of {length.seq_len} tokens"
    return {
        "data": "; ".join([words, *notes]),
        "prompts": f"{style}; {100 * share:.0f} % of the tokens are learned",
        "batch": batch,
    }

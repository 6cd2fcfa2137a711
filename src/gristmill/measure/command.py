"""The command `gristmill evaluate`: tasks, then the model, then the results.

find the tasks ─ open the model ─ (its Hugging Face copy) ─ measure ─ table and results.json
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gristmill import __version__
from gristmill.config.evaluate import Evaluate
from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.source import ModelDir
from gristmill.infer.load import memory, note
from gristmill.measure import harness, tasks
from gristmill.measure.copy import copy_model
from gristmill.measure.kept import Kept
from gristmill.measure.results import Results, summary
from gristmill.measure.subject import Subject
from gristmill.models.device import bf16_supported, choose_device
from gristmill.util.errors import UserError

DTYPES = {"float32": "32-true", "bfloat16": "bf16-true"}


def evaluate(cfg: Evaluate) -> None:
    """Measure the model, print a table and keep the results.

    Raises UserError for what does not fit, before the model is read; RunError when the data of a
    task cannot be had or memory is too small.
    """
    if _words(cfg.tasks) == ["list"]:
        print("\n".join(tasks.names()))
        return
    measure(cfg, show=True)


def measure(cfg: Evaluate, *, show: bool = False) -> dict[str, Any]:
    """The results that are kept, and `samples` where they are asked for; `show` prints the table.

    Raises as `evaluate` does. What was computed until an error or a signal is kept for next time.
    """
    _check(cfg)
    source = open_model_dir(cfg.checkpoint_dir or "")
    precision, remark = _precision(cfg, source)
    results = Results(cfg, source)
    if cfg.access_token is not None:
        os.environ["HF_TOKEN"] = cfg.access_token
    chosen = tasks.choose(_words(cfg.tasks), _words(cfg.include_path))
    device = choose_device(cfg.device).type
    about = (__version__, _weights(source), precision, cfg.quantize, device)
    path = None if cfg.use_cache is None else Path(cfg.use_cache).expanduser()
    with Kept(path or results.answers_path, about, forever=path is not None) as kept, _threads():
        subject = Subject(
            source.path,
            device=cfg.device,
            precision=precision,
            batch_size=cfg.batch_size if isinstance(cfg.batch_size, int) else "auto",
            seed=harness.SEED if cfg.seed is None else cfg.seed,
            tokenizer_dir=cfg.tokenizer_dir,
            quantize=cfg.quantize,
            kept=kept,
            remark=remark,
        )
        if cfg.apply_chat_template:
            _ = subject.chat_template  # says if there is none
        if cfg.out_dir is not None:
            copy_model(
                source,
                cfg.out_dir,
                replace_other=cfg.force_conversion,
                tokenizer_dir=cfg.tokenizer_dir,
            )
        measured = harness.run(subject, chosen.names, chosen.folders, cfg)
        if show:
            print(harness.table(measured))
        for line in (*subject.remarks(), *harness.unheeded(measured, cfg)):
            note(line)
        note(memory(subject.loaded.device))
        whole = results.save(measured, subject)
    if show:
        print(f"{summary(whole)} ({results.path})")
    return {**whole, "samples": measured["samples"]} if cfg.log_samples else whole


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Leave torch as many threads as it had: a small model takes one."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weights(source: ModelDir) -> object:
    """What tells a model from others, and from itself trained further: the state of its files."""
    files = {entry.file for entry in source.open_tensors().entries.values()}
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return states, source.config, None if source.base is None else _weights(source.base)


def _words(given: list[str] | str | None) -> list[str]:
    """What a list of words, or one text with commas, names."""
    parts = given.split(",") if isinstance(given, str) else given or []
    return [part.strip() for part in parts if part.strip()]


def _check(cfg: Evaluate) -> None:
    """UserError for options that mean nothing, or not together."""
    if cfg.checkpoint_dir is None:
        raise UserError(
            "no model given. name a model directory as the first word: gristmill evaluate "
            "out/quickstart/run --tasks …"
        )
    if not _words(cfg.tasks):
        raise UserError(
            f"no task is named. give some: gristmill evaluate {cfg.checkpoint_dir} --tasks "
            "hellaswag,arc_easy (`gristmill evaluate list` prints all)"
        )
    _refuse_many()
    size = cfg.batch_size
    if isinstance(size, str):
        word, _, count = size.partition(":")
        wrong = word != "auto" or (":" in size and not _is_positive(count))
    else:
        wrong = size < 1
    if wrong:
        raise UserError(
            f"--batch_size {size} is no size. give a positive whole number, or auto.",
            {"--batch_size": "auto"},
        )
    if cfg.limit is not None and not (cfg.limit >= 1 or 0 < cfg.limit < 1):
        raise UserError(
            f"--limit {cfg.limit} is no number of documents. give 1 or more, or a share below 1."
        )
    if cfg.num_fewshot is not None and cfg.num_fewshot < 0:
        raise UserError(
            f"--num_fewshot {cfg.num_fewshot} is no number of examples. give 0 or more."
        )
    if cfg.fewshot_as_multiturn is not None and not cfg.apply_chat_template:
        raise UserError(
            "--fewshot_as_multiturn says how examples are put in a chat, and this is none. leave "
            "it out, or add --apply_chat_template true.",
            {"--apply_chat_template": "true"},
        )
    if cfg.force_conversion and cfg.out_dir is None:
        raise UserError(
            "--force_conversion is for the model in --out_dir, and none is given: nothing is "
            "converted to measure a model. leave it out, or give --out_dir.",
            {"--force_conversion": None},
        )
    if cfg.dtype is not None and cfg.precision not in ("auto", DTYPES[cfg.dtype]):
        raise UserError(
            f"--dtype {cfg.dtype} and --precision {cfg.precision} are not the same. give one.",
            {"--dtype": None},
        )


def _refuse_many() -> None:
    """UserError where this is one of several processes: each would measure everything."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise UserError(
            f"{count} processes were started, and an evaluation is one, on one device. start it "
            "alone; several devices take a part of the tasks each: --device cuda:1 --tasks …"
        )


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _precision(cfg: Evaluate, source: ModelDir) -> tuple[str, str | None]:
    """What is computed in: what is asked for, or what the weights are stored in; and a remark."""
    device = choose_device(cfg.device)
    if cfg.dtype is not None:
        return DTYPES[cfg.dtype], None
    if cfg.precision != "auto":
        return cfg.precision, None
    fast = bf16_supported(device)
    stored = str(source.parameters()["embed.weight"].dtype).removeprefix("torch.")
    if stored == "bfloat16" and fast:
        return "bf16-true", None
    remark = "Computed in float32, as the weights are stored; --precision bf16-mixed is faster."
    return "32-true", remark if fast else None

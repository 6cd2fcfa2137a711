"""The command `gristmill inspect`: what a path is, on a page or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gristmill.config.commands import Inspect
from gristmill.data.look.page import Page, counted, size
from gristmill.infer.identify import Found, dump, identify
from gristmill.models.zoo.listing import short
from gristmill.util.errors import UserError


def inspect(cfg: Inspect) -> None:
    """Print what is at the path. Raises UserError, after the page, when something is wrong."""
    if cfg.path is None:
        raise UserError("nothing to inspect is named. Name a path: gristmill inspect out/run")
    found = identify(cfg.path)
    if cfg.json:
        print(dump(found))
    else:
        page = Page()
        page.line((found.path, "bold"))
        for label, text in _lines(found):
            page.line((f"  {label:<14}", "dim"), text)
        for number, command in enumerate(found.commands if not found.problems else []):
            page.line((f"  {'use it' if not number else '':<14}", "dim"), command)
    if found.problems:
        opened = found.model or found.kind != "model directory"
        what = f"{found.path} is not whole: " if opened else ""
        raise UserError(what + " ".join(found.problems))


def _lines(found: Found) -> Iterator[tuple[str, str]]:
    """What there is to say, as (label, text)."""
    yield "kind", found.kind
    if found.training:
        yield from _training(found.training)
    if found.model:
        yield from _model(found.model)
    if found.dataset:
        yield (
            "holds",
            (
                f"{found.dataset.get('tokens', 0):,} tokens, "
                f"{found.dataset.get('documents', 0):,} documents, "
                f"{counted(found.dataset.get('chunks', 0), 'chunk')}"
            ),
        )
    if "unread" in found.tokenizer:
        yield "tokenizer", found.tokenizer["unread"]
    elif found.tokenizer:
        yield "tokenizer", _tokenizer(found.tokenizer)
        yield "chat template", "yes" if found.tokenizer["chat_template"] else "no"
    elif "dtypes" in found.model and not found.problems:
        yield "tokenizer", "none here"
    yield "on disk", f"{size(found.num_bytes)} in {counted(found.num_files, 'file')}"
    yield "whole", "no" if found.problems else "yes, as far as names and sizes tell"


def _training(training: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "step" in training:
        total = f" of {training['total_steps']:,}" if "total_steps" in training else ""
        yield "trained", f"{training['step']:,}{total} steps, {training['tokens']:,} tokens"
    if "checkpoints" in training:
        names = training["checkpoints"]
        newest = f", the newest is {names[0]}" if names else ""
        final = ", and final/" if training["final"] else ""
        yield "checkpoints", f"{len(names)}{newest}{final}"
        if training.get("step", 0) < training.get("total_steps", 0):
            yield "going on", "the command that it was started with goes on from there"
    if training.get("unfinished"):
        yield "unfinished", f"{', '.join(training['unfinished'])} (left by a save that was killed)"


def _model(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "architecture" in model:
        yield "model", f"{model['name']} ({model['architecture']})"
        heads = f"{model['heads']} heads"
        if model["kv_heads"] != model["heads"]:
            heads += f", {model['kv_heads']} for keys and values"
        if "base" in model:
            yield "base", model["base"]
        yield "parameters", f"{model['parameters']:,} ({short(model['parameters'])})"
        yield "shape", f"{model['layers']} layers, width {model['width']:,}, {heads}"
        yield "context", f"{model['context']:,} tokens"
        ids, rows = model["num_token_ids"], model["vocab_size"]
        yield "vocabulary", f"{rows:,} rows" + (f", {ids:,} token ids" if ids != rows else "")
    if "note" in model:
        yield "note", model["note"]
    if model.get("dtypes"):
        types = model["dtypes"]
        everything = sum(types.values())
        shares = (
            f"{name} ({number / everything:.1%})" if len(types) > 1 else name
            for name, number in types.items()
        )
        yield "weights", f"{', '.join(shares)}, {model['tensors']:,} tensors"


def _tokenizer(tokenizer: dict[str, Any]) -> str:
    ends = [f"{role} {tokenizer[role]}" for role in ("bos", "eos") if tokenizer[role]]
    return ", ".join([tokenizer["kind"], f"{tokenizer['num_token_ids']:,} ids", *ends])

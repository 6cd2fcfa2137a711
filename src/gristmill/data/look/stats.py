"""`gristmill data stats`: what datasets hold, and how often a planned run would read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.config.data_commands import DataStats, listed
from gristmill.data.look import find
from gristmill.data.look.lengths import Lengths, document_lengths
from gristmill.data.look.page import Page, columns, counted, flowed, percent, size
from gristmill.data.reading.order import samples_per_chunk
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

_BAR = 30


def run(cfg: DataStats) -> None:
    """Print what the datasets hold, for people or as JSON."""
    paths = listed(cfg.data_path)
    if not paths:
        raise UserError("no dataset is named. for example: gristmill data stats OUT")
    _check(cfg)
    with find.opening() as open_dataset:
        datasets = [open_dataset(path) for path in find.below(paths)]
        looks = [(dataset, document_lengths(dataset)) for dataset in datasets]
    shares = planned(cfg, [d for d in datasets if not find.is_validation(d)])
    if cfg.json:
        value: dict[str, Any] = {"datasets": [as_json(*look) for look in looks]}
        if shares:
            value["run"] = [dataclasses.asdict(share) for share in shares]
        print(json.dumps(value, indent=1))
        return
    page = Page()
    for number, look in enumerate(looks):
        if number:
            page.line()
        _show(page, *look)
    if len(datasets) > 1:
        _show_sum(page, datasets)
    if shares:
        _show_run(page, cfg, shares)


@dataclass(frozen=True)
class Share:
    """What a planned run reads of one dataset. `epoch_tokens` leaves out what no sample holds."""

    path: str
    weight: float
    epoch_tokens: int
    epoch_samples: int | None
    epoch_steps: float | None
    tokens: int | None
    epochs: float | None


def planned(cfg: DataStats, datasets: Sequence[Dataset]) -> list[Share]:
    """Each training dataset's part of the run that the options describe; none without options."""
    if cfg.max_tokens is None and cfg.seq_len is None:
        return []
    if cfg.weights is not None and len(cfg.weights) != len(datasets):
        names = ", ".join(str(dataset.path) for dataset in datasets)
        raise UserError(
            f"--weights has {len(cfg.weights)} numbers for {counted(len(datasets), 'dataset')} "
            f"that a training reads ({names}). give one for each."
        )
    samples: list[int | None] = [
        None
        if cfg.seq_len is None
        else int(samples_per_chunk(dataset.chunk_tokens, cfg.seq_len).sum())
        for dataset in datasets
    ]
    epochs = [
        dataset.num_tokens if number is None or cfg.seq_len is None else number * cfg.seq_len
        for dataset, number in zip(datasets, samples, strict=True)
    ]
    weights: Sequence[float] = cfg.weights if cfg.weights is not None else epochs
    total = sum(weights)
    shares = []
    for dataset, number, epoch, weight in zip(datasets, samples, epochs, weights, strict=True):
        part = weight / total if total else 0.0
        tokens = None if cfg.max_tokens is None else round(cfg.max_tokens * part)
        shares.append(
            Share(
                path=str(dataset.path),
                weight=part,
                epoch_tokens=epoch,
                epoch_samples=number,
                epoch_steps=number / cfg.global_batch_size
                if number is not None and cfg.global_batch_size
                else None,
                tokens=tokens,
                epochs=tokens / epoch if tokens is not None and epoch else None,
            )
        )
    return shares


def as_json(dataset: Dataset, lengths: Lengths) -> dict[str, Any]:
    """Everything `data stats` knows of a dataset, as plain values."""
    manifest, source = dataset.manifest, dataset.manifest.source
    totals = dataclasses.asdict(manifest.totals)
    value: dict[str, Any] = {
        "path": str(dataset.path),
        "dataset_id": dataset.dataset_id,
        **totals,
        "bytes": int(dataset.chunks.sizes.sum()),
        "dtype": dataset.dtype,
        "num_token_ids": manifest.num_token_ids,
        "bytes_per_token": _bytes_per_token(dataset),
        "tokenizer": dataclasses.asdict(manifest.tokenizer) if manifest.tokenizer else None,
        "document_lengths": dataclasses.asdict(lengths),
        "source": None,
    }
    if source is not None:
        value["source"] = {
            name: item for name, item in dataclasses.asdict(source).items() if name != "inputs"
        }
        value["source"]["input_files"] = len(source.inputs)
        value["source"]["input_bytes"] = sum(bytes_ for _, bytes_ in source.inputs)
    return value


def _check(cfg: DataStats) -> None:
    for option in ("max_tokens", "seq_len", "global_batch_size"):
        value = getattr(cfg, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value} is too few. give 1 or more.")
    if cfg.global_batch_size is not None and cfg.seq_len is None:
        raise UserError(
            f"--global_batch_size {cfg.global_batch_size} counts samples, whose length is not "
            "given. add --seq_len.",
        )
    if cfg.weights is not None and cfg.max_tokens is None:
        raise UserError("--weights share out the tokens of a run. add --max_tokens.")
    if cfg.weights is not None and (min(cfg.weights, default=0) < 0 or not sum(cfg.weights)):
        raise UserError(f"--weights {cfg.weights} share out nothing. give whole numbers above 0.")


def _bytes_per_token(dataset: Dataset) -> float | None:
    return dataset.text_bytes / dataset.num_tokens if dataset.text_bytes is not None else None


def _show(page: Page, dataset: Dataset, lengths: Lengths) -> None:
    page.line((str(dataset.path), "bold"))
    for name, text in _facts(dataset):
        page.line((f"  {name:<11}", "dim"), text)
    sampled = lengths.chunks < len(dataset.chunks)
    where = (
        f" (of {lengths.documents:,} in {lengths.chunks:,} of {len(dataset.chunks):,} chunks)"
        if sampled
        else ""
    )
    page.line((f"  {'length':<11}", "dim"), f"tokens of a document{where}")
    numbers = [
        f"shortest {lengths.shortest:,}",
        f"median {lengths.median:,}",
        f"mean {lengths.mean:,.0f}",
        f"90 % {lengths.p90:,}",
        f"99 % {lengths.p99:,}",
        f"longest {lengths.longest:,}",
    ]
    for line in flowed(numbers, page.width - 13):
        page.line(f"  {'':<11}{line}")
    page.line()
    _histogram(page, lengths)


def _facts(dataset: Dataset) -> list[tuple[str, str]]:
    """Names and values of everything but the lengths."""
    manifest = dataset.manifest
    stored = int(dataset.chunks.sizes.sum())
    rows = [f"{dataset.num_tokens:,}", f"{dataset.num_documents:,}"]
    width = max(map(len, rows))
    facts = [
        (
            "tokens",
            f"{rows[0]:>{width}}   {dataset.dtype}, {size(stored)} in "
            f"{counted(len(dataset.chunks), 'chunk')}",
        ),
        (
            "documents",
            f"{rows[1]:>{width}}   "
            f"{dataset.num_tokens / max(1, dataset.num_documents):,.0f} tokens each on average",
        ),
    ]
    per_token = _bytes_per_token(dataset)
    if per_token is None:
        facts.append(("text", "not known: the dataset was adopted"))
    else:
        facts.append(("text", f"{size(dataset.text_bytes or 0)}, {per_token:.2f} bytes per token"))
    if manifest.tokenizer is not None:
        record = manifest.tokenizer
        frame = [
            f"{name} {value} {where} each document"
            for name, value, where in (
                ("BOS", record.bos_id, "before"),
                ("EOS", record.eos_id, "after"),
            )
            if value is not None
        ]
        facts.append(
            (
                "tokenizer",
                f"{manifest.num_token_ids or 0:,} ids, sha256 {record.digest[:12]}…, "
                f"{' and '.join(frame) or 'no BOS or EOS'}",
            )
        )
    elif manifest.num_token_ids is not None:
        facts.append(("tokenizer", f"{manifest.num_token_ids:,} ids"))
    return facts + _origin(dataset)


def _origin(dataset: Dataset) -> list[tuple[str, str]]:
    source = dataset.manifest.source
    if source is None:
        return [("from", "another tool (no record of the text)")]
    total = sum(bytes_ for _, bytes_ in source.inputs)
    split = f", the {source.split} side of a split" if source.split else ""
    split += ", a small slice to try things (--fast_dev_run)" if source.fast_dev_run else ""
    origin = f"{source.layout}, {counted(len(source.inputs), 'file')} of {size(total)}{split}"
    facts = [("from", origin)]
    if source.filters:
        facts.append(("kept", json.dumps(dict(source.filters), ensure_ascii=False)))
    if source.map:
        facts.append(("map", source.map))
    left = [f"{number:,} {reason}" for reason, number in source.rejects.items()]
    if source.filtered:
        left.append(f"{source.filtered:,} filtered")
    if source.empty_documents:
        left.append(f"{source.empty_documents:,} without text")
    if source.quarantined:
        left.append(f"{counted(len(source.quarantined), 'damaged file')}")
    if left:
        job = " (of the whole job)" if source.split else ""
        facts.append(("left out", ", ".join(left) + job))
    return facts


def _histogram(page: Page, lengths: Lengths) -> None:
    most = max(bin_.documents for bin_ in lengths.bins)
    tokens = max(1, sum(bin_.tokens for bin_ in lengths.bins))
    rows = [("tokens", "documents", "", "of all tokens")]
    for bin_ in lengths.bins:
        span = f"{bin_.low:,}" if bin_.low == bin_.high else f"{bin_.low:,} - {bin_.high:,}"
        share = percent(bin_.documents / lengths.documents) if bin_.documents else ""
        held = percent(bin_.tokens / tokens) if bin_.tokens else ""
        rows.append((span, f"{bin_.documents:,}", share, held))
    head, *lines = columns(rows, left=())
    page.line((f"  {head}", "dim"))
    room = max(8, min(_BAR, page.width - len(head) - 5))
    for line, bin_ in zip(lines, lengths.bins, strict=True):
        bar = page.bar(bin_.documents / most, room)
        page.line(f"  {line:<{len(head)}}  ", (bar, "cyan"))


def _show_sum(page: Page, datasets: Sequence[Dataset]) -> None:
    total = sum(dataset.num_tokens for dataset in datasets)
    rows = [("dataset", "tokens", "share", "documents", "bytes/token", "dtype", "on disk")]
    for dataset in datasets:
        per_token = _bytes_per_token(dataset)
        rows.append(
            (
                str(dataset.path),
                f"{dataset.num_tokens:,}",
                percent(dataset.num_tokens / total),
                f"{dataset.num_documents:,}",
                "?" if per_token is None else f"{per_token:.2f}",
                dataset.dtype,
                size(int(dataset.chunks.sizes.sum())),
            )
        )
    stored = sum(int(dataset.chunks.sizes.sum()) for dataset in datasets)
    documents = sum(dataset.num_documents for dataset in datasets)
    rows.append(("together", f"{total:,}", "", f"{documents:,}", "", "", size(stored)))
    _show_table(page, rows, last="bold")


def _show_run(page: Page, cfg: DataStats, shares: Sequence[Share]) -> None:
    what = [] if cfg.max_tokens is None else [f"a run of {cfg.max_tokens:,} tokens"]
    if cfg.seq_len is not None:
        what.append(f"samples of {cfg.seq_len:,} tokens")
    if cfg.global_batch_size is not None:
        what.append(f"{cfg.global_batch_size:,} samples a step")
    page.line()
    page.line((", ".join(what), "bold"))
    head = ["dataset", "tokens in an epoch"]
    head += ["samples"] if cfg.seq_len is not None else []
    head += ["steps"] if cfg.global_batch_size is not None else []
    head += ["share", "tokens of the run", "epochs"] if cfg.max_tokens is not None else []
    rows = [head]
    for share in shares:
        row = [share.path, f"{share.epoch_tokens:,}"]
        row += [f"{share.epoch_samples:,}"] if share.epoch_samples is not None else []
        row += [f"{share.epoch_steps:,.1f}"] if share.epoch_steps is not None else []
        if share.tokens is not None:
            epochs = "-" if share.epochs is None else f"{share.epochs:,.2f}"
            row += [percent(share.weight), f"{share.tokens:,}", epochs]
        rows.append(row)
    _show_table(page, rows)
    if any(not share.epoch_tokens for share in shares):
        page.line("  a dataset without a sample of that length has no epoch: it is never read")


def _show_table(page: Page, rows: Sequence[Sequence[str]], last: str = "") -> None:
    lines = columns(rows)
    if last:
        page.line()
    for number, line in enumerate(lines):
        style = "dim" if number == 0 else last if number == len(lines) - 1 else ""
        page.line((f"  {line}", style))

"""`gristmill data inspect`: a document, a sample or a training step's batch, as a person reads it.

Samples come from the same `TokenStream` that training reads: what is shown is what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from gristmill.config.data_commands import DataInspect
from gristmill.data.dataset import Dataset
from gristmill.data.look import find, runs
from gristmill.data.look.page import Page, columns, counted, percent
from gristmill.data.look.places import Places
from gristmill.data.look.transcript import EDGE, SPECIAL, Transcript, cut, lines
from gristmill.data.order import samples_per_chunk
from gristmill.data.stream import Batch, TokenStream
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tokens = NDArray[Any]

_DEFAULT_SEED = 42
_DOCUMENT_CHARS, _ROW_CHARS = 2000, 300


def run(cfg: DataInspect) -> None:
    """Print what the options ask for; the first document when they ask for nothing."""
    asked = [name for name in ("document", "sample", "step") if getattr(cfg, name) is not None]
    if len(asked) > 1:
        names = " and ".join(f"--{name}" for name in asked)
        raise UserError(f"{names} are given. ask for one of them.", {f"--{asked[-1]}": None})
    with find.opening() as open_dataset:
        look = _opened(cfg, open_dataset)
        if "step" in asked:
            _show_step(cfg, look)
        elif "sample" in asked:
            _show_sample(cfg, look)
        else:
            _show_document(cfg, look)


@dataclass(frozen=True)
class Look:
    """What is looked at, and with what eyes."""

    dataset: Dataset
    reading: runs.Reading | None
    transcript: Transcript
    places: Places
    page: Page


def _opened(cfg: DataInspect, open_dataset: find.Open) -> Look:
    """The dataset and the tokenizer that the options name."""
    if cfg.run is not None:
        path = None if cfg.data_path is None else find.train_of(cfg.data_path)
        reading = runs.read_run(Path(cfg.run).expanduser(), path, open_dataset)
        dataset = reading.dataset
    elif cfg.data_path is not None:
        reading, dataset = None, open_dataset(find.train_of(cfg.data_path))
    else:
        raise UserError(
            "no dataset is named. for example: gristmill data inspect OUT, or --run RUN for the "
            "data of a training."
        )
    page = Page()
    record = dataset.manifest.tokenizer
    named = cfg.tokenizer_dir or dataset.tokenizer_dir or (reading and reading.tokenizer_dir)
    tokenizer = Tokenizer.load(named) if named else None
    page.line((str(dataset.path), "bold"))
    if tokenizer is None:
        page.line("  no tokenizer is in it: ids are shown (--tokenizer_dir DIR shows the text)")
    elif record is not None and record.digest != tokenizer.digest:
        page.line(
            (f"  {named} is not the tokenizer that made these tokens: ", SPECIAL),
            f"sha256 {tokenizer.digest[:12]}, not {record.digest[:12]}",
        )
    frame = (record.bos_id, record.eos_id) if record else (None, None)
    if tokenizer is not None and record is None:
        frame = (tokenizer.bos_id, tokenizer.eos_id)
    return Look(dataset, reading, Transcript(tokenizer, frame), Places(dataset), page)


def _show_document(cfg: DataInspect, look: Look) -> None:
    _refuse(cfg, "a document", ("row", "seq_len", "global_batch_size", "seed"))
    number, total = cfg.document or 0, look.places.num_documents
    if not 0 <= number < total:
        raise UserError(
            f"--document {number} is not there: the dataset has {counted(total, 'document')}. "
            f"give 0 to {total - 1}."
        )
    length = look.places.length(number)
    chunk, _ = look.places.where(number)
    look.page.line(
        f"document {number:,} of {total:,} · {counted(length, 'token')} · "
        f"begins in {look.dataset.chunks[chunk].name}"
    )
    look.page.line()
    most = _most(cfg, _DOCUMENT_CHARS)
    # A character takes four tokens at most; what will not be shown is not read.
    tokens = look.places.tokens(number, length if most == 0 else min(length, 4 * most + 64))
    text = Window(tokens, np.array([length]), number, 0)
    _show_window(look, text, most, ids=cfg.ids, total=length)


def _show_sample(cfg: DataInspect, look: Look) -> None:
    _refuse(cfg, "a sample by its number on the disk", ("row", "global_batch_size", "seed"))
    assert cfg.sample is not None
    seq_len = _setting(cfg, look, "seq_len")
    stream = TokenStream(look.dataset, seq_len, seed=0, shuffle=False, endless=False)
    if not 0 <= cfg.sample < stream.num_samples:
        raise UserError(
            f"--sample {cfg.sample} is not there: with {seq_len:,} tokens each, the dataset has "
            f"{counted(stream.num_samples, 'sample')}. "
            + (
                f"give 0 to {stream.num_samples - 1}."
                if stream.num_samples
                else "use a shorter --seq_len."
            )
        )
    title = f"sample {cfg.sample:,} of {stream.num_samples:,} in the order on the disk"
    _show_row(cfg, look, stream.batch(cfg.sample, 1), 0, _most(cfg, _DOCUMENT_CHARS), title)


def _show_step(cfg: DataInspect, look: Look) -> None:
    assert cfg.step is not None
    seq_len, rows = (_setting(cfg, look, name) for name in ("seq_len", "global_batch_size"))
    seed = look.reading.seed if look.reading else cfg.seed
    if look.reading and cfg.seed not in (None, seed):
        raise UserError(f"--seed {cfg.seed}, but the run's is {seed}. leave it out.")
    if cfg.step < 1:
        raise UserError(f"--step {cfg.step} is not there. the first is 1.", {"--step": 1})
    if cfg.row is not None and not 0 <= cfg.row < rows:
        raise UserError(f"--row {cfg.row} is not there: a step has {rows:,}. give 0 to {rows - 1}.")
    seed = _DEFAULT_SEED if seed is None else seed
    stream = TokenStream(look.dataset, seq_len, seed=seed)
    before = (cfg.step - 1) * rows
    if cfg.run is not None:
        before = runs.consumed(Path(cfg.run).expanduser(), cfg.step, rows)
    batch = stream.batch(before, rows)
    epoch, done = divmod(before, stream.num_samples)
    of = f" of {look.reading.total_steps:,}" if look.reading else ""
    look.page.line(
        f"step {cfg.step:,}{of} · seed {seed} · {counted(rows, 'row')} of {seq_len:,} + 1 tokens"
    )
    digest = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(batch.tokens, dtype="<i8").data)
    look.page.line(
        f"samples {before:,} to {before + rows - 1:,} of the run · epoch {epoch + 1:,}, "
        f"{percent(done / stream.num_samples)} of it read before · batch {digest}"
    )
    if look.reading and cfg.step > look.reading.total_steps:
        look.page.line(("the run ends before it: this is what would follow", SPECIAL))
    shown = range(rows) if cfg.row is None else [cfg.row]
    most = _most(cfg, _ROW_CHARS if len(shown) > 1 else _DOCUMENT_CHARS)
    for row in shown:
        title = f"row {row}: sample {int(batch.sample_ids[row]):,}"
        look.page.line()
        _show_row(cfg, look, batch, row, most, title)


@dataclass(frozen=True)
class Window:
    """Tokens as they follow each other, and where documents end in them (after a last one).

    The first token is number `before` of document `document`.
    """

    tokens: Tokens
    ends: NDArray[Any]
    document: int
    before: int


def _show_row(cfg: DataInspect, look: Look, batch: Batch, row: int, most: int, title: str) -> None:
    """One row of a batch, with the place that it comes from."""
    seq_len = batch.tokens.shape[1] - 1
    samples = samples_per_chunk(look.dataset.chunk_tokens, seq_len)
    last = np.cumsum(samples)
    number = int(batch.sample_ids[row])
    chunk = int(np.searchsorted(last, number, side="right"))
    start = (number - int(last[chunk] - samples[chunk])) * seq_len
    place = look.places.at(chunk, start)
    name = look.dataset.chunks[chunk].name
    where = f" · {name}, tokens {start:,} to {start + seq_len:,} and the next as last target"
    look.page.line((title, "bold"), (where, "dim"))
    window = Window(batch.tokens[row], batch.doc_ends[row], place.document, place.before)
    _show_window(look, window, most, ids=cfg.ids)


def _show_window(
    look: Look, window: Window, most: int, *, ids: bool, total: int | None = None
) -> None:
    """A window with its boundaries, up to `most` characters; `total` tokens there really are."""
    page, tokens = look.page, window.tokens.tolist()
    total = len(tokens) if total is None else total
    document, before, start, room = window.document, window.before, 0, most
    for end in [*window.ends.tolist(), None]:
        stop = total if end is None else end
        if start >= total:
            break
        _edge(page, f"document {document:,}" + (f", from its token {before:,}" if before else ""))
        part = tokens[start:stop]
        if ids:
            shown, whole = _show_ids(look, part, start, room, unlimited=most == 0)
        else:
            shown, whole = _show_text(look, part, room, unlimited=most == 0)
        room -= shown
        if not whole or stop > len(tokens):
            _edge(page, f"… cut here, of {total:,} tokens in all: --max_chars 0 shows them")
            return
        if end is None:
            _edge(page, f"document {document:,} goes on")
            return
        _edge(page, f"end of document {document:,}")
        document, before, start = document + 1, 0, stop


def _show_text(look: Look, ids: Sequence[int], room: int, *, unlimited: bool) -> tuple[int, bool]:
    """Running text; how many characters it took, and whether it is all."""
    if not unlimited and room <= 0:
        return 0, False
    parts, short = cut(look.transcript.parts(ids), 0 if unlimited else room)
    for line in lines(parts):
        look.page.line(*line)
    return sum(len(part if isinstance(part, str) else part[0]) for part in parts), not short


def _show_ids(
    look: Look, ids: Sequence[int], start: int, room: int, *, unlimited: bool
) -> tuple[int, bool]:
    """A token a line; how many characters of text they took, and whether they are all."""
    taken, rows = 0, []
    for place, number in enumerate(ids, start):
        if not unlimited and taken >= room:
            break
        piece = look.transcript.piece(number)
        text = "".join(part if isinstance(part, str) else part[0] for part in piece)
        taken += max(1, len(text))
        rows.append((f"{place:,}", str(number), piece))
    heads = columns([row[:2] for row in rows], left=()) if rows else []
    for head, (_, _, piece) in zip(heads, rows, strict=True):
        look.page.line((f"{head}  ", "dim"), *piece)
    return taken, len(rows) == len(ids)


def _edge(page: Page, text: str) -> None:
    page.line((f"⟦{text}⟧", EDGE))


def _most(cfg: DataInspect, usual: int) -> int:
    if cfg.max_chars == "auto":
        return usual
    if cfg.max_chars < 0:
        raise UserError(f"--max_chars {cfg.max_chars} is too few. give 0 for all, or a number.")
    return cfg.max_chars


def _setting(cfg: DataInspect, look: Look, name: str) -> int:
    """A number that the run knows or the user gives."""
    typed = getattr(cfg, name)
    if look.reading is not None:
        value = int(getattr(look.reading, name))
        if typed not in (None, value):
            raise UserError(
                f"--{name} {typed}, but the run's is {value}. leave it out.", {f"--{name}": None}
            )
        return value
    if typed is None:
        raise UserError(
            f"--{name} is missing. give what the training has, or --run RUN to take it from there."
        )
    if typed < 1:
        raise UserError(f"--{name} {typed} is too few. give 1 or more.")
    return int(typed)


def _refuse(cfg: DataInspect, what: str, names: Sequence[str]) -> None:
    """Raise UserError for options that `what` does not have."""
    typed = [f"--{name}" for name in names if getattr(cfg, name) is not None]
    if typed:
        raise UserError(
            f"{', '.join(typed)}: {what} has none. leave it out, or ask for --step.",
            dict.fromkeys(typed),
        )

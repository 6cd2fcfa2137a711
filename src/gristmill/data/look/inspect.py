"""`gristmill data inspect`: a document, a sample or a training step's batch, as a person reads it.

Samples come from the very stream that training reads (`data/reading/training.py`): what is shown
is what is trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from gristmill.config.data_commands import DataInspect
from gristmill.config.sections import TrainArgs
from gristmill.data.look import find, runs
from gristmill.data.look.page import Page, columns, counted, percent
from gristmill.data.look.places import Places
from gristmill.data.look.transcript import EDGE, SPECIAL, Transcript, cut, lines
from gristmill.data.reading.corpus import Corpus, Part
from gristmill.data.reading.stream import Batch, TokenStream
from gristmill.data.reading.training import document_mask, is_packed, training_stream
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

    corpus: Corpus
    reading: runs.Reading | None
    settings: TrainArgs
    transcript: Transcript
    places: tuple[Places, ...]
    page: Page

    @property
    def several(self) -> bool:
        """Whether there is more than one source to tell apart."""
        return len(self.corpus.names) > 1

    def first_document(self, source: int) -> int:
        """The number of a source's first document; sources are counted one after another."""
        return sum(places.num_documents for places in self.places[:source])


def _opened(cfg: DataInspect, open_dataset: find.Open) -> Look:
    """The data and the tokenizer that the options name."""
    path = None if cfg.data_path is None else find.train_of(cfg.data_path)
    reading = None
    if cfg.run is not None:
        reading = runs.read_run(Path(cfg.run).expanduser(), path, open_dataset)
        corpus = reading.corpus
    elif path is not None:
        corpus = Corpus((Part(path),), (open_dataset(path),), ())
    else:
        raise UserError(
            "no dataset is named. for example: gristmill data inspect OUT, or --run RUN for the "
            "data of a training."
        )
    page = Page()
    for name, part in zip(corpus.names, corpus.parts, strict=True):
        what = f"{name}: {part.path}" if len(corpus.names) > 1 else str(part.path)
        page.line((what, "bold"))
    return Look(
        corpus,
        reading,
        reading.settings if reading else TrainArgs(),
        _transcript(cfg, corpus, reading, page),
        tuple(Places(dataset) for dataset in corpus.datasets),
        page,
    )


def _transcript(
    cfg: DataInspect, corpus: Corpus, reading: runs.Reading | None, page: Page
) -> Transcript:
    """What turns ids into text; says where that is not, or not surely, what they meant."""
    named = cfg.tokenizer_dir or corpus.tokenizer_dir or (reading and reading.tokenizer_dir)
    tokenizer = Tokenizer.load(named) if named else None
    records = [d.manifest.tokenizer for d in corpus.datasets if d.manifest.tokenizer is not None]
    if tokenizer is None:
        page.line("  no tokenizer is in it: ids are shown (--tokenizer_dir DIR shows the text)")
    elif records and records[0].digest != tokenizer.digest:
        page.line(
            (f"  {named} is not the tokenizer that made these tokens: ", SPECIAL),
            f"sha256 {tokenizer.digest[:12]}, not {records[0].digest[:12]}",
        )
    frame = [number for record in records for number in (record.bos_id, record.eos_id)]
    if tokenizer is not None and not records:
        frame = [tokenizer.bos_id, tokenizer.eos_id]
    return Transcript(tokenizer, frame)


def _show_document(cfg: DataInspect, look: Look) -> None:
    _refuse(cfg, "a document", ("row", "seq_len", "global_batch_size", "seed"))
    number, total = cfg.document or 0, look.first_document(len(look.places))
    if not 0 <= number < total:
        raise UserError(
            f"--document {number} is not there: the dataset has {counted(total, 'document')}. "
            f"give 0 to {total - 1}."
        )
    source = max(s for s in range(len(look.places)) if look.first_document(s) <= number)
    places, own = look.places[source], number - look.first_document(source)
    length = places.length(own)
    chunk, _ = places.where(own)
    look.page.line(
        f"document {number:,} of {total:,} · {counted(length, 'token')} · "
        f"begins in {_chunk_name(look, source, chunk)}"
    )
    look.page.line()
    most = _most(cfg, _DOCUMENT_CHARS)
    # A character takes four tokens at most; what will not be shown is not read.
    tokens = places.tokens(own, length if most == 0 else min(length, 4 * most + 64))
    _show_pieces(look, [Piece(number, 0, tokens, ends=True)], most, ids=cfg.ids, total=length)


def _show_sample(cfg: DataInspect, look: Look) -> None:
    _refuse(cfg, "a sample by its number on the disk", ("row", "global_batch_size", "seed"))
    assert cfg.sample is not None
    seq_len = _setting(cfg, look, "seq_len")
    stream = look.corpus.held_out(seq_len, packing=is_packed(look.settings, look.corpus))
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
    row = Row(stream, stream.batch(cfg.sample, 1), 0)
    _show_row(cfg, look, row, _most(cfg, _DOCUMENT_CHARS), title)


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
    stream = training_stream(look.settings, look.corpus, seq_len=seq_len, seed=seed)
    before = (cfg.step - 1) * rows
    if cfg.run is not None:
        before = runs.consumed(Path(cfg.run).expanduser(), cfg.step, rows)
    batch = stream.batch(before, rows)
    of = f" of {look.reading.total_steps:,}" if look.reading else ""
    look.page.line(
        f"step {cfg.step:,}{of} · seed {seed} · {counted(rows, 'row')} of {seq_len:,} + 1 tokens"
    )
    digest = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(batch.tokens, dtype="<i8").data)
    look.page.line(
        f"samples {before:,} to {before + rows - 1:,} of the run · "
        f"{_read_before(look, stream, before)} · batch {digest}"
    )
    if look.reading:
        _say_how(look, look.reading, cfg.step)
    shown = range(rows) if cfg.row is None else [cfg.row]
    most = _most(cfg, _ROW_CHARS if len(shown) > 1 else _DOCUMENT_CHARS)
    for row in shown:
        title = f"row {row}: sample {int(batch.sample_ids[row]):,}"
        look.page.line()
        _show_row(cfg, look, Row(stream, batch, row), most, title)


def _read_before(look: Look, stream: TokenStream, samples: int) -> str:
    """How much of the data comes before a sample of the stream, in words."""
    if look.several:
        read = zip(look.corpus.names, stream.epochs(samples), strict=True)
        return "epochs read before: " + ", ".join(f"{name} {times:.2f}" for name, times in read)
    epoch, done = divmod(samples, stream.num_samples)
    return f"epoch {epoch + 1:,}, {percent(done / stream.num_samples)} of it read before"


def _say_how(look: Look, reading: runs.Reading, step: int) -> None:
    """How the run takes a batch, besides its tokens."""
    apart = document_mask(reading.settings, look.corpus)
    look.page.line(
        "documents of a row are kept apart (document mask)"
        if apart
        else "attention reaches over documents (no document mask)"
    )
    if step > reading.total_steps:
        look.page.line(("the run ends before it: this is what would follow", SPECIAL))


@dataclass(frozen=True)
class Row:
    """A row of a batch, and the stream that it is from."""

    stream: TokenStream
    batch: Batch
    number: int


@dataclass(frozen=True)
class Piece:
    """Tokens of one document; the first is its token `before`, the last its last if it `ends`."""

    document: int
    before: int
    tokens: Tokens
    ends: bool


def _show_row(cfg: DataInspect, look: Look, row: Row, most: int, title: str) -> None:
    """One row of a batch, with the place that it comes from."""
    batch, number = row.batch, row.number
    source, chunk, places = row.stream.place(int(batch.sample_ids[number]))
    length, width = int(batch.lengths[number]), batch.tokens.shape[1]
    pieces = _pieces(look, row, source, chunk, places)
    where = f" · {_chunk_name(look, source, chunk)}, "
    if row.stream.packing:
        where += f"{counted(len(pieces), 'piece')} of documents, {length:,} of {width:,} tokens"
    else:
        where += f"tokens {places[0]:,} to {places[-1]:,} and the next as last target"
    look.page.line((title, "bold"), (where, "dim"))
    _show_pieces(look, pieces, most, ids=cfg.ids, total=length)
    if length < width:
        _edge(look.page, f"padding: {counted(width - length, 'token')}")


def _pieces(
    look: Look, row: Row, source: int, chunk: int, places: NDArray[np.int64]
) -> list[Piece]:
    """The documents of a row, each with its number among those of all sources."""
    tokens = row.batch.tokens[row.number]
    bounds = [0, *row.batch.doc_ends[row.number].tolist()]
    if bounds[-1] < len(places):
        bounds.append(len(places))
    found, first = [], look.first_document(source)
    for start, stop in itertools.pairwise(bounds):
        at = look.places[source].at(chunk, int(places[start]))
        ends = look.places[source].ends_at(chunk, int(places[stop - 1]))
        found.append(Piece(first + at.document, at.before, tokens[start:stop], ends))
    return found


def _chunk_name(look: Look, source: int, chunk: int) -> str:
    """A chunk's name, with its source where there are several."""
    name = look.corpus.datasets[source].chunks[chunk].name
    return f"{look.corpus.names[source]} · {name}" if look.several else name


def _show_pieces(look: Look, pieces: Sequence[Piece], most: int, *, ids: bool, total: int) -> None:
    """Pieces with their boundaries, up to `most` characters; `total` tokens there really are."""
    page, start, room = look.page, 0, most
    for piece in pieces:
        document, before, part = piece.document, piece.before, piece.tokens.tolist()
        _edge(page, f"document {document:,}" + (f", from its token {before:,}" if before else ""))
        if ids:
            shown, whole = _show_ids(look, part, start, room, unlimited=most == 0)
        else:
            shown, whole = _show_text(look, part, room, unlimited=most == 0)
        room -= shown
        start += len(part)
        if not whole or (piece is pieces[-1] and start < total):
            _edge(page, f"… cut here, of {total:,} tokens in all: --max_chars 0 shows them")
            return
        _edge(
            page,
            f"end of document {document:,}" if piece.ends else f"document {document:,} goes on",
        )


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

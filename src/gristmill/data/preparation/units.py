"""One unit of preparation: spans of text to parts of chunks, a pure function of the plan.

    read ──▶ user's map ──▶ part train and val ──▶ encode ──▶ frame with BOS, EOS ──▶ shuffle, write

Parts are chunk files (`parts.py`). Long documents go the same way in pieces: neither their text nor
their tokens are ever held whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gristmill.data.preparation.parts import Side, framed
from gristmill.data.preparation.plan import FAST_DEV_BYTES, Plan, limited
from gristmill.data.preparation.split import TRAIN, VAL
from gristmill.data.raw import sources
from gristmill.data.raw.documents import (
    DataError,
    Document,
    Filtered,
    LongText,
    OnError,
    Reject,
    Unreadable,
)
from gristmill.data.raw.select import load_map
from gristmill.data.storage import Storage
from gristmill.data.store.chunks import ChunkRecord
from gristmill.tokenizer.long_text import MAX_UNCUT_BYTES, Cutter, TooLong, utf8_size
from gristmill.util.errors import RunError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Tokens = NDArray[Any]
    Int64s = NDArray[np.int64]

RECORD = "unit.json"
REJECTS = "rejects.jsonl"
DAMAGED = "damaged or unreadable file"
"""The reason that quarantined files are listed with."""

# A batch is one call of the engine: everything made of it stays in the processor's cache.
_BATCH_CHARS = 200_000
_BATCH_TEXTS = 4096
_MAX_REJECTS_LISTED = 10_000
_TOO_LONG = "too long for this tokenizer"


class Engine(Protocol):
    """What encodes texts."""

    @property
    def cutter(self) -> Cutter:
        """Where long texts may be cut without changing their ids."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], Int64s]:
        """(ids, offsets): text i is ids[offsets[i]:offsets[i + 1]]."""


@dataclass(frozen=True)
class SplitRecord:
    """What a unit gives to one of the datasets."""

    documents: int
    text_bytes: int
    parts: tuple[ChunkRecord, ...]


@dataclass(frozen=True)
class Quarantined:
    """A file, or a part of one, that was left out, and the bytes of text lost (estimated)."""

    path: str
    reason: str
    text_bytes: int
    detail: str = ""


@dataclass(frozen=True)
class UnitRecord:
    """What a committed unit holds. `splits` has one entry for each of the plan's."""

    unit: int
    splits: tuple[SplitRecord, ...]
    rejects: dict[str, int]
    empty_documents: int
    filtered: int = 0
    """Documents that a filter or the user's function left out."""
    quarantined: tuple[Quarantined, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all splits."""
        return sum(part.tokens for split in self.splits for part in split.parts)

    @property
    def documents(self) -> int:
        """Documents in all splits."""
        return sum(split.documents for split in self.splits)

    def to_json(self) -> str:
        """The record as text, the same for equal records."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> UnitRecord:
        """The record that `to_json` gave."""
        value = json.loads(text)
        splits = tuple(
            SplitRecord(
                split["documents"],
                split["text_bytes"],
                tuple(ChunkRecord(**part) for part in split["parts"]),
            )
            for split in value.pop("splits")
        )
        quarantined = tuple(Quarantined(**item) for item in value.pop("quarantined"))
        return cls(splits=splits, quarantined=quarantined, **value)


@dataclass
class Progress:
    """Work done so far in a unit; `committed` at the very end."""

    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    rejects: int = 0
    committed: bool = False


Report = Callable[[Progress], None]


def chunk_name(unit: int, index: int) -> str:
    """The name in a dataset of part `index` of a unit, or of the chunk that begins with it."""
    return f"chunk-{unit:07d}-{index}.bin"


def joins(parts: Sequence[ChunkRecord], chunk_tokens: int) -> list[bool]:
    """Which parts of one split of a unit are small ones, to be joined with others."""
    found, after_cut = [], False
    for part in parts:
        small = part.tokens < chunk_tokens // 4
        found.append(small and not part.continues and not after_cut)
        after_cut = part.continues
    return found


def read_record(folder: Path) -> UnitRecord:
    """The record of the committed unit in `folder`."""
    return UnitRecord.from_json((folder / RECORD).read_text(encoding="utf-8"))


def run_unit(
    plan: Plan,
    unit: int,
    root: Storage,
    engine: Engine,
    folder: Path,
    report: Report,
    on_error: OnError = "skip",
) -> UnitRecord:
    """Write the parts of a unit, its rejects and, last, its record into the empty `folder`.

    Raises DataError when an input is damaged or has changed; with `quarantine` its span is left
    out instead. Raises UserError for a bad document with `fail`.
    """
    left_out: dict[int, Quarantined] = {}
    while True:
        run = _Run(plan, unit, root, engine, folder, report, on_error, left_out)
        try:
            return run.write()
        except DataError as error:
            if on_error != "quarantine":
                raise
            span = plan.units[unit][run.at]
            item = plan.inputs[span.input]
            left_out[run.at] = Quarantined(item.path, DAMAGED, plan.span_bytes(span), error.cause)
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass
class _Run:
    """One attempt at a unit. `at` is the number of the span that is being read."""

    plan: Plan
    unit: int
    root: Storage
    engine: Engine
    folder: Path
    report: Report
    on_error: OnError
    left_out: dict[int, Quarantined]
    at: int = 0
    done: Progress = field(default_factory=Progress)
    rejects: list[Reject] = field(default_factory=list)
    num_rejects: Counter[str] = field(default_factory=Counter)
    num_empty: int = 0
    num_filtered: int = 0
    # Read and not yet encoded, with the number of the span each comes from.
    texts: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    num_chars: int = 0

    def __post_init__(self) -> None:
        """Open what is needed for all documents."""
        recipe = self.plan.recipe
        self.spans = self.plan.units[self.unit]
        self.map = load_map(recipe.map) if recipe.map else None
        shape = (recipe.dtype, recipe.chunk_tokens, recipe.seed)
        self.sides = [
            Side(self.folder, name, *shape, (self.unit, number))
            for number, name in enumerate(recipe.splits)
        ]
        self.text_bytes = [0] * len(self.sides)

    def write(self) -> UnitRecord:
        """Read, encode and write everything; the record."""
        for document in self._documents():
            if isinstance(document, str):
                self.texts.append(document)
                self.owners.append(self.at)
                self.num_chars += len(document)
                if self.num_chars >= _BATCH_CHARS or len(self.texts) >= _BATCH_TEXTS:
                    self._encode_gathered()
            elif isinstance(document, Reject):
                self._reject(document)
            elif isinstance(document, Filtered):
                self.num_filtered += 1
            elif self.map is None:
                self._encode_gathered()
                self._encode_long(document)
            else:
                self._gather_whole(document)
        self._encode_gathered()
        return self._record()

    def _documents(self) -> Iterator[Document]:
        plan = self.plan
        selection = plan.recipe.selection()
        for number, span in enumerate(self.spans):
            self.at = number
            if number in self.left_out:
                continue
            found: Iterable[Document] = sources.read_span(
                plan.recipe.format,
                self.root,
                plan.inputs[span.input],
                span,
                selection=selection,
                check=True,
            )
            if plan.recipe.fast_dev_run:
                found = limited(found, FAST_DEV_BYTES // len(self.spans))
            yield from found

    def _gather_whole(self, document: LongText) -> None:
        """The user's function gets long documents whole, whatever memory that takes."""
        try:
            text = "".join(document.pieces())
        except Unreadable as error:
            self._reject(error.reject)
            return
        self.texts.append(text)
        self.owners.append(self.at)
        self.num_chars += len(text)

    def _reject(self, reject: Reject) -> None:
        """Count a document that is left out, or end the job."""
        if self.on_error == "fail":
            detail = f"; {reject.detail}" if reject.detail else ""
            raise UserError(
                f"a document of {self.root.at(reject.path)} cannot be prepared, at {reject.at:,}: "
                f"{reject.reason}{detail}. mend or move it away, or leave such documents out "
                "with --on_error skip.",
                fix={"--on_error": "skip"},
            )
        self.num_rejects[reject.reason] += 1
        self.done.rejects += 1
        if len(self.rejects) < _MAX_REJECTS_LISTED:
            self.rejects.append(reject)

    def _reject_long(self, number: int, beginning: str) -> None:
        span = self.spans[number]
        detail = f"a stretch of it cannot be cut; the document begins {beginning[:60]!r}"
        path = self.plan.inputs[span.input].path
        self._reject(Reject(path, max(span.start, 0), _TOO_LONG, detail))

    def _encode_gathered(self) -> None:
        """Encode the documents that were read, and give them to their sides."""
        texts, owners = self.texts, self.owners
        self.texts, self.owners, self.num_chars = [], [], 0
        if self.map is not None and texts:
            texts, owners = self._mapped(texts, owners)
        if not texts:
            return
        longest = max(map(len, texts))
        if 3 * longest > MAX_UNCUT_BYTES or not all(texts) or any(map(str.isspace, texts)):
            texts, owners = self._without_unfit(texts, owners)
            if not texts:
                return
        texts, sides = self._parted(texts, owners)
        ids, offsets = self._ids(texts)
        lengths = np.diff(offsets)
        sizes = list(map(utf8_size, texts))
        for number, side in enumerate(self.sides):
            if len(self.sides) == 1:
                self._add(side, ids, lengths)
                self.text_bytes[number] += sum(sizes)
                continue
            mine = np.array(sides, dtype=np.int64) == number
            if mine.any():
                self._add(side, ids[np.repeat(mine, lengths)], lengths[mine])
                self.text_bytes[number] += int(np.array(sizes)[mine].sum())
        self.done.text_bytes += sum(sizes)
        self.done.documents += len(texts)
        self.done.tokens += len(ids)
        self.report(self.done)

    def _mapped(self, texts: list[str], owners: list[int]) -> tuple[list[str], list[int]]:
        assert self.map is not None
        results = self.map(texts)
        kept = [n for n, result in enumerate(results) if result is not None]
        self.num_filtered += len(texts) - len(kept)
        return [text for text in results if text is not None], [owners[n] for n in kept]

    def _without_unfit(self, texts: list[str], owners: list[int]) -> tuple[list[str], list[int]]:
        """The documents that hold text and can be encoded."""
        kept = []
        for number, text in enumerate(texts):
            if not text or text.isspace():
                self.num_empty += 1
            elif 3 * len(text) > MAX_UNCUT_BYTES and not self.engine.cutter.fits(text):
                self._reject_long(owners[number], text)
            else:
                kept.append(number)
        return [texts[n] for n in kept], [owners[n] for n in kept]

    def _parted(self, texts: list[str], owners: list[int]) -> tuple[list[str], list[int]]:
        """Texts and their sides, documents parted where the split parts blocks."""
        plan = self.plan
        if len(self.sides) == 1:
            return texts, []
        if plan.recipe.val_pattern is not None:
            return texts, [self._fixed_side(owner) for owner in owners]
        parted = [part for text in texts for part in plan.split.sides(text)]
        return [text for _, text in parted], [side for side, _ in parted]

    def _fixed_side(self, number: int) -> int:
        return VAL if self.spans[number].input in self.plan.val_inputs else TRAIN

    def _ids(self, texts: list[str]) -> tuple[Tokens, Int64s]:
        ids, offsets = self.engine.encode_batch(texts)
        recipe = self.plan.recipe
        if len(ids) and int(ids.max()) >= recipe.num_token_ids:
            raise RunError(
                f"the tokenizer gave id {int(ids.max())}, above its largest "
                f"({recipe.num_token_ids - 1}). its file is damaged: fetch it again."
            )
        return ids, offsets

    def _add(self, side: Side, ids: Tokens, lengths: Int64s) -> None:
        self.num_empty += int((lengths == 0).sum())
        recipe = self.plan.recipe
        side.add(*framed(ids, lengths, recipe.bos_id, recipe.eos_id, recipe.dtype))

    def _encode_long(self, document: LongText) -> None:
        """A long document, in pieces; every trace of it is removed if it turns out to be bad."""
        before = dataclasses.replace(self.done)
        bytes_before, empty_before = list(self.text_bytes), self.num_empty
        for side in self.sides:
            side.mark()
        pieces = document.pieces()
        watched = _Watched(pieces)
        reject: Reject | None = None
        too_long = False
        try:
            for number, group in groupby(self._long_sides(watched), key=itemgetter(0)):
                self._encode_pieces(number, map(itemgetter(1), group))
        except Unreadable as error:
            reject = error.reject
        except TooLong:
            too_long = True
            with contextlib.suppress(Unreadable):
                deque(pieces, maxlen=0)
        if reject is None and not too_long and not watched.blank:
            return
        for side in self.sides:
            side.roll_back()
        self.done = dataclasses.replace(before)
        self.text_bytes, self.num_empty = bytes_before, empty_before
        if reject is not None:
            self._reject(reject)
        elif too_long:
            self._reject_long(self.at, watched.beginning)
        else:
            self.num_empty += 1

    def _long_sides(self, pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
        if len(self.sides) == 1:
            return ((TRAIN, piece) for piece in pieces)
        if self.plan.recipe.val_pattern is not None:
            side = self._fixed_side(self.at)
            return ((side, piece) for piece in pieces)
        return self.plan.split.long_sides(pieces)

    def _encode_pieces(self, number: int, pieces: Iterator[str]) -> None:
        """One document for side `number`, framed, as its pieces come."""
        side, recipe = self.sides[number], self.plan.recipe

        def counted() -> Iterator[str]:
            for piece in pieces:
                size = utf8_size(piece)
                self.text_bytes[number] += size
                self.done.text_bytes += size
                yield piece

        num_tokens = 0
        for texts in _batches(self.engine.cutter.streamed(counted())):
            ids = self._ids(texts)[0].astype(recipe.dtype)
            if len(ids) and not num_tokens and recipe.bos_id is not None:
                side.add_piece(np.array([recipe.bos_id], dtype=ids.dtype))
            side.add_piece(ids)
            num_tokens += len(ids)
            self.done.tokens += len(ids)
            self.report(self.done)
        if num_tokens and recipe.eos_id is not None:
            side.add_piece(np.array([recipe.eos_id], dtype=recipe.dtype))
        self.num_empty += num_tokens == 0
        self.done.documents += 1
        side.end_pieces()

    def _record(self) -> UnitRecord:
        for side in self.sides:
            side.finish()
        record = UnitRecord(
            unit=self.unit,
            splits=tuple(
                SplitRecord(side.documents, size, tuple(side.parts))
                for side, size in zip(self.sides, self.text_bytes, strict=True)
            ),
            rejects=dict(sorted(self.num_rejects.items())),
            empty_documents=self.num_empty,
            filtered=self.num_filtered,
            quarantined=tuple(self.left_out[number] for number in sorted(self.left_out)),
        )
        for number, lost in sorted(self.left_out.items()):
            at = max(self.spans[number].start, 0)
            self.rejects.append(Reject(lost.path, at, DAMAGED, lost.detail))
        lines = [json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in self.rejects]
        (self.folder / REJECTS).write_text(
            "".join(lines), encoding="utf-8", errors="backslashreplace"
        )
        (self.folder / RECORD).write_text(record.to_json(), encoding="utf-8")
        return record


class _Watched:
    """Pieces of a text, and what is seen of it as they pass."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.blank = True
        self.beginning = ""

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self.beginning = self.beginning or piece[:60]
            self.blank = self.blank and piece.isspace()
            yield piece


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

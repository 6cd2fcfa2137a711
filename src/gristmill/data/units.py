"""One unit of preparation: spans of text to parts of chunks, a pure function of the plan.

    read ──▶ part train and val ──▶ encode ──▶ frame with BOS, EOS ──▶ shuffle in blocks ──▶ parts

Parts are chunk files. Memory is bounded by the blocks, not by the unit.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gristmill.data import order, sources
from gristmill.data.chunks import ChunkRecord, write_chunk
from gristmill.data.plan import Plan, Recipe
from gristmill.data.sources import Reject
from gristmill.util.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Tokens = NDArray[Any]
    Int64s = NDArray[np.int64]

RECORD = "unit.json"
REJECTS = "rejects.jsonl"

_BATCH_BYTES = 4 << 20
_BATCH_TEXTS = 4096
# Documents are shuffled among this many tokens.
_BLOCK_TOKENS = 2**25
_DOCUMENTS = 3  # what the shuffle's key is for; see order.py
_MAX_REJECTS_LISTED = 10_000


class Engine(Protocol):
    """What encodes texts."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], Int64s]:
        """(ids, offsets): text i is ids[offsets[i]:offsets[i + 1]]."""


@dataclass(frozen=True)
class SplitRecord:
    """What a unit gives to one of the datasets."""

    documents: int
    text_bytes: int
    parts: tuple[ChunkRecord, ...]


@dataclass(frozen=True)
class UnitRecord:
    """What a committed unit holds. `splits` has one entry for each of the plan's."""

    unit: int
    splits: tuple[SplitRecord, ...]
    rejects: dict[str, int]
    empty_documents: int

    @property
    def tokens(self) -> int:
        """Tokens in all splits."""
        return sum(part.tokens for split in self.splits for part in split.parts)

    @property
    def documents(self) -> int:
        """Documents in all splits."""
        return sum(split.documents for split in self.splits)


@dataclass
class Progress:
    """Work done so far in a unit; `committed` at the very end."""

    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    committed: bool = False


Report = Callable[[Progress], None]


def run_unit(
    plan: Plan, unit: int, root: Path, engine: Engine, folder: Path, report: Report
) -> UnitRecord:
    """Write the parts of a unit, its rejects and, last, its record into the empty `folder`."""
    recipe = plan.recipe
    reader = _Reader(plan, unit, root)
    sides = [_Side(folder, name, recipe, (unit, n)) for n, name in enumerate(recipe.splits)]
    done = Progress()
    for batch in _batches(reader):
        ids, offsets = engine.encode_batch([text for _, text in batch])
        if len(ids) and int(ids.max()) >= recipe.num_token_ids:
            raise RunError(
                f"the tokenizer gave id {int(ids.max())}, above its largest "
                f"({recipe.num_token_ids - 1}). its file is damaged: fetch it again."
            )
        ids = ids.astype(recipe.dtype)
        for number, side in enumerate(sides):
            mine = np.array([s == number for s, _ in batch], dtype=bool)
            if mine.any():
                side.add(*_framed(*_selected(ids, offsets, mine), recipe))
        sizes = [(s, _utf8_size(text)) for s, text in batch]
        for number, side in enumerate(sides):
            side.text_bytes += sum(size for s, size in sizes if s == number)
        done.text_bytes += sum(size for _, size in sizes)
        done.documents += len(batch)
        done.tokens += len(ids)
        report(done)
    record = UnitRecord(
        unit=unit,
        splits=tuple(side.finish() for side in sides),
        rejects=dict(sorted(reader.num_rejects.items())),
        empty_documents=reader.num_empty + sum(side.num_empty for side in sides),
    )
    lines = [json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in reader.rejects]
    (folder / REJECTS).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    text = json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True)
    (folder / RECORD).write_text(text, encoding="utf-8")
    return record


def read_record(folder: Path) -> UnitRecord:
    """The record of the committed unit in `folder`."""
    value = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    splits = [
        SplitRecord(
            split["documents"],
            split["text_bytes"],
            tuple(ChunkRecord(**part) for part in split["parts"]),
        )
        for split in value.pop("splits")
    ]
    return UnitRecord(splits=tuple(splits), **value)


class _Reader:
    """The documents of a unit as (side, text), counting what is left out."""

    def __init__(self, plan: Plan, unit: int, root: Path) -> None:
        self._plan, self._unit, self._root = plan, unit, root
        self.rejects: list[Reject] = []
        self.num_rejects: Counter[str] = Counter()
        self.num_empty = 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        plan = self._plan
        for span in plan.units[self._unit]:
            item = plan.inputs[span.input]
            for text in sources.read_span(plan.recipe.format, self._root, item, span):
                if isinstance(text, Reject):
                    self.num_rejects[text.reason] += 1
                    if len(self.rejects) < _MAX_REJECTS_LISTED:
                        self.rejects.append(text)
                elif not text or text.isspace():
                    self.num_empty += 1
                else:
                    yield from plan.split.sides(text)


def _batches(documents: _Reader) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _selected(ids: Tokens, offsets: Int64s, mine: NDArray[np.bool_]) -> tuple[Tokens, Int64s]:
    """The tokens of the chosen documents, joined, and their lengths."""
    lengths = np.diff(offsets)
    if not mine.all():
        ids = ids[np.repeat(mine, lengths)]
    return ids, lengths[mine]


def _framed(ids: Tokens, lengths: Int64s, recipe: Recipe) -> tuple[Tokens, Int64s]:
    """Each document with BOS and EOS around it; one without tokens stays without any."""
    full = (lengths > 0).astype(np.int64)
    before = full if recipe.bos_id is not None else np.zeros_like(full)
    after = full if recipe.eos_id is not None else np.zeros_like(full)
    framed = before + lengths + after
    ends = np.cumsum(framed)
    tokens = np.empty(int(framed.sum()), dtype=ids.dtype)
    inside = np.ones(len(tokens), dtype=bool)
    if recipe.bos_id is not None:
        first = (ends - framed)[full > 0]
        tokens[first], inside[first] = recipe.bos_id, False
    if recipe.eos_id is not None:
        last = ends[full > 0] - 1
        tokens[last], inside[last] = recipe.eos_id, False
    tokens[inside] = ids
    return tokens, framed


@dataclass
class _Side:
    """The documents of one split: gathered in blocks, shuffled, written as parts."""

    folder: Path
    name: str
    recipe: Recipe
    key: tuple[int, int]
    text_bytes: int = 0
    num_empty: int = 0
    _documents: int = 0
    _blocks: int = 0
    _parts: list[ChunkRecord] = field(default_factory=list)
    _gathered: list[Tokens] = field(default_factory=list)
    _gathered_lengths: list[Int64s] = field(default_factory=list)
    _num_gathered: int = 0
    _open: list[Tokens] = field(default_factory=list)
    _open_tokens: int = 0

    def add(self, tokens: Tokens, lengths: Int64s) -> None:
        """Take whole documents, joined in `tokens`."""
        self.num_empty += int((lengths == 0).sum())
        lengths = lengths[lengths > 0]
        self._documents += len(lengths)
        self._gathered.append(tokens)
        self._gathered_lengths.append(lengths)
        self._num_gathered += len(tokens)
        if self._num_gathered >= _BLOCK_TOKENS:
            self._write_block()

    def finish(self) -> SplitRecord:
        """Write what is left; the record of all parts."""
        self._write_block()
        self._close()
        return SplitRecord(self._documents, self.text_bytes, tuple(self._parts))

    def _write_block(self) -> None:
        if not self._num_gathered:
            return
        tokens = np.concatenate(self._gathered)
        ends = np.cumsum(np.concatenate(self._gathered_lengths))
        self._gathered, self._gathered_lengths, self._num_gathered = [], [], 0
        starts = np.concatenate([[0], ends[:-1]])
        shuffled = order.perm(
            order.key(self.recipe.seed, _DOCUMENTS, *self.key, self._blocks), len(ends)
        )
        self._blocks += 1
        for start, end in zip(starts[shuffled].tolist(), ends[shuffled].tolist(), strict=True):
            self._put(tokens[start:end])
        # The open part must not keep the block alive.
        self._open = [document.copy() for document in self._open]

    def _put(self, document: Tokens) -> None:
        limit = self.recipe.chunk_tokens
        if self._open_tokens + len(document) > limit:
            self._close()
        while len(document) > limit:
            self._write([document[:limit]], continues=True)
            document = document[limit:]
        self._open.append(document)
        self._open_tokens += len(document)

    def _close(self) -> None:
        if self._open:
            self._write(self._open)
            self._open, self._open_tokens = [], 0

    def _write(self, documents: list[Tokens], *, continues: bool = False) -> None:
        path = self.folder / f"{self.name or 'all'}-{len(self._parts)}.bin"
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = [np.concatenate(documents)]
        self._parts.append(
            write_chunk(path, tokens, lengths, self.recipe.dtype, continues=continues)
        )

"""The plan of a preparation: sorted inputs cut into units of work, and a hash that names the job.

Cutting looks at names and sizes only, never at the machine, and a unit is described completely:
whoever runs it, however often, writes the same bytes. A plan is kept in columns, so that one of
hundreds of thousands of units is made, stored and loaded in seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from gristmill.data.preparation.split import Split, plan_split
from gristmill.data.raw import sources
from gristmill.data.raw.documents import (
    DataError,
    Document,
    Filtered,
    Format,
    Input,
    LongText,
    Reject,
    Span,
    Unreadable,
)
from gristmill.data.raw.inputs import glob_regex
from gristmill.data.raw.select import Selection, load_map
from gristmill.data.storage import Storage
from gristmill.data.store.chunks import MAX_CHUNK_TOKENS
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

VERSION = 3

MAX_UNIT_BYTES = 256 << 20
_MIN_UNIT_BYTES = 1 << 20
# Small inputs get smaller units: this many keep many cores busy to the end.
_UNITS_WANTED = 64

# Bytes of text per byte of a file, by how its name ends: for cutting, progress and disk space.
_TEXT_PER_BYTE = {".gz": 4, ".zst": 4, ".parquet": 2}
# A compressed file is read from its start for each of its parts. On one core, zstd gives about
# 400 MB/s of text and the fastest engine encodes 50 to 130 MB/s: with four parts, two cores are
# done in two thirds of the time and four in half of it. Many files keep cores busy without that.
_MAX_PARTS = 4
_FEW_FILES = 16
_COMPRESSED_LINES = re.compile(r".*\.(jsonl|ndjson)\.(gz|zst)", re.IGNORECASE)
_RATIO_BYTES = 1 << 20
DEFAULT_CHUNK_TOKENS = 2**24
FAST_DEV_BYTES = 1_000_000
"""Text that `fast_dev_run` prepares."""

_SAMPLE_BYTES = 1_000_000
_SAMPLED_INPUTS = 16
_MAX_REJECTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every option that shapes a dataset. The engine does not: all engines give the same ids."""

    layout: str
    records: Literal["text", "records"] = "text"
    text_field: str = "text"
    separator: str | None = None
    filters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Which records are kept; see `select.Selection`."""
    map: str | None = None
    """The user's function, as module:name; `map_digest` is of its source."""
    map_digest: str | None = None
    tokenizer: str
    """Digest of the tokenizer."""
    num_token_ids: int
    bos_id: int | None
    eos_id: int | None
    dtype: str
    chunk_tokens: int
    val_fraction: float = 0.0
    val_pattern: str | None = None
    """Files that are validation, as a glob, instead of a share."""
    fast_dev_run: bool = False
    """Only about 1 MB of text, from inputs spread over all."""
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The options as plain values; a digest only of a function that there is."""
        options = dataclasses.asdict(self)
        if self.map_digest is None:
            del options["map_digest"]
        return options

    def __post_init__(self) -> None:
        """Refuse what cannot be prepared."""
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"--val_fraction {self.val_fraction} is no share of the text. "
                "give a number from 0 to below 1, for example 0.01."
            )
        if self.val_fraction and self.val_pattern:
            raise UserError(
                f"--val_fraction {self.val_fraction} and --val_pattern {self.val_pattern!r} "
                "exclude each other. give one of them.",
                fix={"--val_fraction": 0.0},
            )
        if not 1024 <= self.chunk_tokens <= MAX_CHUNK_TOKENS:
            raise UserError(
                f"--chunk_tokens {self.chunk_tokens:,} is out of range. "
                f"give 1,024 to {MAX_CHUNK_TOKENS:,}, or auto."
            )
        if self.separator == "":
            raise UserError(
                "--separator is empty. give the text that parts documents, or leave it out."
            )

    @property
    def format(self) -> Format:
        """How input files part into documents."""
        return Format(self.records, self.text_field, self.separator)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the datasets that come out, by side; one without a name if not split."""
        return ("train", "val") if self.val_fraction or self.val_pattern else ("",)

    def selection(self) -> Selection | None:
        """What keeps records or leaves them out."""
        return Selection.from_settings(self.filters) if self.filters else None


Unit = tuple[Span, ...]


class Units(Sequence[Unit]):
    """The spans of all units, in columns. `spans` is int64 [n, 3]: input, start, stop."""

    def __init__(self, starts: Int64s, spans: Int64s) -> None:
        self.starts, self.spans = starts, spans

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, unit: int) -> Unit: ...
    @overload
    def __getitem__(self, unit: slice) -> list[Unit]: ...

    def __getitem__(self, unit: int | slice) -> Unit | list[Unit]:
        if isinstance(unit, slice):
            return [self[number] for number in range(*unit.indices(len(self)))]
        if not 0 <= unit < len(self):
            raise IndexError(unit)
        rows = self.spans[self.starts[unit] : self.starts[unit + 1]]
        return tuple(Span(*row) for row in rows.tolist())


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done, in full."""

    recipe: Recipe
    inputs: Sequence[Input]
    units: Units
    split: Split
    val_inputs: frozenset[int] = frozenset()
    """Numbers of the inputs that `val_pattern` makes validation."""

    @cached_property
    def hash(self) -> str:
        """64 hexadecimal digits that name what is prepared; the same wherever the files lie."""
        # Two spellings of one name on two machines are one file.
        inputs = [[i.path for i in self.inputs], [i.size for i in self.inputs]]
        return _sha256({**self._shape(), "inputs": inputs})

    @cached_property
    def job(self) -> str:
        """64 hexadecimal digits that name the work: they change when an input file does."""
        return _sha256([self.hash, [item.version for item in self.inputs]])

    def text_bytes(self, unit: int) -> int:
        """Bytes of text in a unit, estimated where files are not plain text."""
        return int(self._unit_bytes[unit])

    def span_bytes(self, span: Span) -> int:
        """Bytes of text in a span, estimated likewise."""
        item = self.inputs[span.input]
        ratio = _span_ratio(item)
        end = weight(item) if span.stop < 0 else span.stop * ratio
        return max(end - span.start * ratio, 0)

    @cached_property
    def _unit_bytes(self) -> Int64s:
        spans, starts = self.units.spans, self.units.starts
        if not len(self.units):
            return np.zeros(0, dtype=np.int64)
        weights = np.array([weight(item) for item in self.inputs], dtype=np.int64)
        ratios = np.array([_span_ratio(item) for item in self.inputs], dtype=np.int64)
        owner, start, stop = spans.T
        ends = np.where(stop < 0, weights[owner], stop * ratios[owner])
        sums: Int64s = np.add.reduceat(np.maximum(ends - start * ratios[owner], 0), starts[:-1])
        return sums

    def _shape(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "recipe": self.recipe.to_json(),
            "units": self.units.starts.tolist(),
            "spans": self.units.spans.T.tolist(),
            "split": dataclasses.asdict(self.split),
            "val_inputs": sorted(self.val_inputs),
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        columns = {
            name: [getattr(item, name) for item in self.inputs]
            for name in ("path", "size", "version")
        }
        places = {str(n): i.place for n, i in enumerate(self.inputs) if i.place != i.path}
        return {**self._shape(), "inputs": {**columns, "places": places}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan that `to_json` gave."""
        found = value["inputs"]
        places = found["places"]
        rows = zip(found["path"], found["size"], found["version"], strict=True)
        return cls(
            Recipe(**value["recipe"]),
            tuple(
                Input(path, places.get(str(n), path), size, version)
                for n, (path, size, version) in enumerate(rows)
            ),
            Units(_int64(value["units"]), _int64(value["spans"]).reshape(3, -1).T),
            Split(**value["split"]),
            frozenset(value["val_inputs"]),
        )


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _int64(values: Any) -> Int64s:
    return np.array(values, dtype=np.int64)


def make_plan(recipe: Recipe, root: Storage, inputs: Sequence[Input]) -> Plan:
    """The plan for these inputs below `root`.

    Of the inputs, only samples are read, and what holding out text needs. Raises UserError when an
    input cannot be read, or no text can be found in all of them.
    """
    if recipe.fast_dev_run:
        chosen = _validation(recipe, inputs)
        held = _spread([item for n, item in enumerate(inputs) if n in chosen])
        inputs = _spread([item for n, item in enumerate(inputs) if n not in chosen])
        inputs = sorted([*inputs, *held], key=lambda i: i.path.encode("utf-8", "surrogateescape"))
    sample_texts(recipe, root, inputs)  # a wrong field is found before much is read
    total = FAST_DEV_BYTES if recipe.fast_dev_run else sum(map(weight, inputs))
    split = plan_split(_texts(recipe, root, inputs), recipe.val_fraction, recipe.seed, total)
    return lay_out(recipe, inputs, split, lambda item: _text_size(root, item))


def lay_out(
    recipe: Recipe,
    inputs: Sequence[Input],
    split: Split,
    text_size: Callable[[Input], int] | None = None,
) -> Plan:
    """The plan for these inputs, of which none is read; `text_size` is asked about compressed ones
    where files are few."""
    units = Units(*_cut(recipe, inputs, text_size or weight))
    return Plan(recipe, tuple(inputs), units, split, _validation(recipe, inputs))


def _spread(inputs: Sequence[Input]) -> Sequence[Input]:
    """A few inputs, evenly spread over all."""
    step = max(1, len(inputs) // _SAMPLED_INPUTS)
    return inputs[::step][:_SAMPLED_INPUTS]


def _validation(recipe: Recipe, inputs: Sequence[Input]) -> frozenset[int]:
    if recipe.val_pattern is None:
        return frozenset()
    matches = re.compile(glob_regex(recipe.val_pattern)).fullmatch
    found = frozenset(n for n, item in enumerate(inputs) if matches(item.path))
    if not 0 < len(found) < len(inputs):
        which = "none" if not found else "all"
        raise UserError(
            f"--val_pattern {recipe.val_pattern!r} matches {which} of the {len(inputs):,} input "
            f"files (the first is {inputs[0].path}). give a pattern that matches some of them, "
            "or --val_fraction."
        )
    return found


def weight(item: Input) -> int:
    """Bytes of text in an input, estimated where it is not plain text."""
    return item.size * _TEXT_PER_BYTE.get(_suffix(item), 1)


def _suffix(item: Input) -> str:
    return "." + item.place.rpartition(".")[2].lower()


def _span_ratio(item: Input) -> int:
    """Bytes of text per unit that the spans of an input are counted in."""
    suffix = _suffix(item)
    # In compressed files these are bytes of text already.
    return 1 if suffix in (".gz", ".zst") else _TEXT_PER_BYTE.get(suffix, 1)


def _cut(
    recipe: Recipe, inputs: Sequence[Input], text_size: Callable[[Input], int]
) -> tuple[Int64s, Int64s]:
    """Where units start, and the spans of all: of about equal size where inputs can be parted.

    Neighbouring spans are together until they make a unit.
    """
    if recipe.fast_dev_run:
        everything = [(number, 0, -1) for number in range(len(inputs))]
        return _int64([0, len(inputs)]), _int64(everything)
    total = sum(map(weight, inputs))
    unit_bytes = max(_MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, total // _UNITS_WANTED))
    form = recipe.format
    most = min(_MAX_PARTS, -(-_FEW_FILES // max(1, len(inputs))))
    starts, filled = [0], 0
    spans: list[tuple[int, int, int]] = []
    for number, item in enumerate(inputs):
        whole = size = weight(item)
        parts = 1
        if size > unit_bytes:
            if sources.is_parted(form, item.place):
                parts, size = round(size / unit_bytes), item.size
            elif most > 1 and form.records == "records" and _COMPRESSED_LINES.fullmatch(item.place):
                whole = size = text_size(item)
                parts = max(1, min(most, round(size / unit_bytes)))
        ends = [part * size // parts for part in range(parts)] + [-1]
        for start, stop in zip(ends, ends[1:], strict=False):
            if len(spans) > starts[-1] and filled + whole // parts > unit_bytes * 5 // 4:
                starts.append(len(spans))
                filled = 0
            spans.append((number, start, stop))
            filled += whole // parts
    if spans:
        starts.append(len(spans))
    return _int64(starts), _int64(spans).reshape(-1, 3)


def _text_size(root: Storage, item: Input) -> int:
    """Bytes of text in a compressed file, judged by how its beginning is packed."""
    try:
        with root.open(item.place) as file:
            data = file.read(_RATIO_BYTES)
    except OSError as error:
        raise UserError(
            f"cannot read {root.at(item.place)} ({error.strerror or error}). "
            "make it readable, or narrow the pattern."
        ) from error
    text = sources.unpacked_bytes(data, gzipped=item.place.lower().endswith(".gz"))
    return item.size * text // max(1, len(data)) if text else weight(item)


def documents(recipe: Recipe, root: Storage, number: int, item: Input) -> Iterator[Document]:
    """The documents of a whole input, up to where it is damaged: what is there, its unit says."""
    selection = recipe.selection()
    span = Span(number, 0, -1)
    with contextlib.suppress(DataError):
        yield from sources.read_span(
            recipe.format, root, item, span, selection=selection, check=False
        )


def limited(found: Iterable[Document], budget: int) -> Iterator[str | Reject | Filtered]:
    """The first documents, `budget` characters in all; the last is cut there."""
    for document in found:
        if isinstance(document, Reject | Filtered):
            yield document
            # A large file of nothing else must not be read to its end.
            budget -= 100 if isinstance(document, Reject) else 0
        else:
            text = document if isinstance(document, str) else head(document, budget)
            yield text[:budget]
            budget -= len(text)
        if budget <= 0:
            return


def head(document: LongText, length: int) -> str:
    """The first characters of a long document, which cannot be read on after that."""
    found, size = [], 0
    with contextlib.suppress(Unreadable):
        for piece in document.pieces():
            found.append(piece)
            size += len(piece)
            if size >= length:
                break
    return "".join(found)[:length]


def _texts(recipe: Recipe, root: Storage, inputs: Sequence[Input]) -> Iterator[str | LongText]:
    """The documents that are to be split, as units see them."""
    function = load_map(recipe.map) if recipe.map else None
    for number, item in enumerate(inputs):
        found: Iterable[Document] = documents(recipe, root, number, item)
        if recipe.fast_dev_run:
            found = limited(found, FAST_DEV_BYTES // len(inputs))
        for document in found:
            if isinstance(document, Reject | Filtered):
                continue
            if function is None:
                yield document
            else:
                yield from filter(None, function([_whole(document)]))


def _whole(document: str | LongText) -> str:
    if isinstance(document, str):
        return document
    with contextlib.suppress(Unreadable):
        return "".join(document.pieces())
    return ""


def sample_texts(recipe: Recipe, root: Storage, inputs: Sequence[Input]) -> list[str]:
    """Up to 1 MB of the input's own text, from inputs spread evenly over all.

    Raises UserError when the input holds no readable text at all.
    """
    chosen = _spread(inputs)
    rejects: list[Reject] = []
    filtered: list[Filtered] = []
    sample: list[str] = []
    for number, item in enumerate(chosen):
        budget = _SAMPLE_BYTES // len(chosen)
        sample += _sampled(recipe, root, number, item, budget, rejects, filtered)
    if sample:
        return sample
    rejects.clear()
    for number, item in enumerate(inputs):
        if sample := _sampled(recipe, root, number, item, _SAMPLE_BYTES, rejects, filtered):
            return sample
        if len(rejects) >= _MAX_REJECTS:
            break
    else:
        _raise_damage(recipe, root, inputs)
    where = root.at(inputs[0].place) if len(inputs) == 1 else root.root
    if filtered:
        raise UserError(
            f"the filters leave nothing of {where} ({json.dumps(recipe.filters)}). "
            "check their fields and values (--filter)."
        )
    raise UserError(sources.nothing_read(where, len(inputs), rejects))


def _sampled(
    recipe: Recipe,
    root: Storage,
    number: int,
    item: Input,
    budget: int,
    rejects: list[Reject],
    filtered: list[Filtered],
) -> list[str]:
    texts = []
    for document in limited(documents(recipe, root, number, item), budget):
        if isinstance(document, Reject):
            rejects.append(document)
        elif isinstance(document, Filtered):
            filtered[:] = [document]  # that there is one is enough
        elif isinstance(document, str) and document and not document.isspace():
            texts.append(document)
    return texts


def _raise_damage(recipe: Recipe, root: Storage, inputs: Sequence[Input]) -> None:
    """Raise the DataError that left nothing of a first input, if there is one."""
    span = Span(0, 0, -1)
    for _ in sources.read_span(recipe.format, root, inputs[0], span, check=False):
        return

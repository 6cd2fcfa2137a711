"""The plan of a preparation: sorted inputs cut into units of work, and a hash that names the job.

Cutting looks at the input only, never at the machine, and a unit is described completely: whoever
runs it, however often, writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.data import compressed, sources
from gristmill.data.chunks import MAX_CHUNK_TOKENS
from gristmill.data.sources import Format, Input, Reject, Span
from gristmill.data.split import Split, plan_split
from gristmill.util.errors import UserError

VERSION = 1

MAX_UNIT_BYTES = 256 << 20
_MIN_UNIT_BYTES = 1 << 20
# Small inputs get smaller units: this many keep many cores busy to the end.
_UNITS_WANTED = 64

TEXT_PER_COMPRESSED_BYTE = 4
# A compressed file is read from its start for each of its parts: cut only where files are few.
_MAX_PARTS = 4
_FEW_FILES = 16
_MAX_PARTED_BYTES = 64 << 20

DEFAULT_CHUNK_TOKENS = 2**24
_SAMPLE_BYTES = 1_000_000
_SAMPLED_INPUTS = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every option that shapes a dataset. The engine does not: all engines give the same ids."""

    layout: str
    text_field: str
    separator: str | None
    tokenizer: str
    """Digest of the tokenizer."""
    num_token_ids: int
    bos_id: int | None
    eos_id: int | None
    dtype: str
    chunk_tokens: int
    val_fraction: float
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be prepared."""
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"--val_fraction {self.val_fraction} is no share of the text. "
                "give a number from 0 to below 1, for example 0.01."
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
        return Format(self.layout, self.text_field, self.separator)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the datasets that come out, by side; one without a name if not split."""
        return ("train", "val") if self.val_fraction else ("",)


Unit = tuple[Span, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be done, in full."""

    recipe: Recipe
    inputs: tuple[Input, ...]
    units: tuple[Unit, ...]
    split: Split

    @cached_property
    def hash(self) -> str:
        """64 hexadecimal digits that name the job: equal plans write equal datasets."""
        value = self.to_json()
        # Two spellings of one name on two machines are one file.
        value["inputs"] = [(item.path, item.size) for item in self.inputs]
        text = json.dumps({"version": VERSION, **value}, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def text_bytes(self, unit: int) -> int:
        """Bytes of text in a unit, estimated where it is compressed."""
        return sum(_weight(self.inputs[span.input], span) for span in self.units[unit])

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan that `to_json` gave."""
        return cls(
            Recipe(**value["recipe"]),
            tuple(Input(**item) for item in value["inputs"]),
            tuple(tuple(Span(**span) for span in unit) for unit in value["units"]),
            Split(**value["split"]),
        )


def make_plan(recipe: Recipe, root: Path, inputs: Sequence[Input]) -> Plan:
    """The plan for these inputs below `root`. Reads every input once, for its digest.

    Raises UserError when an input cannot be read, or no text can be found in all of them.
    """
    sample_texts(recipe, root, inputs)  # a wrong field is found before much is read
    total = sum(_weight(item) for item in inputs)
    unit_bytes = max(_MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, total // _UNITS_WANTED))
    most = min(_MAX_PARTS, -(-_FEW_FILES // len(inputs)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cut = pool.map(
            lambda n: _cut(recipe, root, n, inputs[n], unit_bytes, most), range(len(inputs))
        )
        spans = [span for parts in cut for span in parts]
        digests = pool.map(lambda span: _digest(root, inputs, span), spans)
        spans = [dataclasses.replace(s, digest=d) for s, d in zip(spans, digests, strict=True)]
    texts = (t for t in _texts(recipe, root, inputs) if isinstance(t, str))
    split = plan_split(texts, recipe.val_fraction, recipe.seed, total)
    return Plan(recipe, tuple(inputs), tuple(_grouped(inputs, spans, unit_bytes)), split)


def _cut(
    recipe: Recipe, root: Path, number: int, item: Input, unit_bytes: int, most: int
) -> list[Span]:
    """The parts of one input, about `unit_bytes` of text each where it can be read in parts.

    A compressed file has at most `most`.
    """
    path = root / item.place
    parts, size = 1, item.size
    if recipe.format.lines and not compressed.is_compressed(path):
        parts = max(1, round(size / unit_bytes))
    elif (
        recipe.format.lines
        and most > 1
        and size <= _MAX_PARTED_BYTES
        and _weight(item) > unit_bytes
    ):
        size = _text_size(path)
        parts = max(1, min(most, round(size / unit_bytes)))
    ends = [part * size // parts for part in range(parts)] + [-1]
    return [Span(number, a, b, "") for a, b in zip(ends, ends[1:], strict=False)]


def _text_size(path: Path) -> int:
    try:
        return compressed.text_size(path)
    except (OSError, EOFError, ValueError, compressed.Damaged) as error:
        raise UserError(
            f"{path} is damaged or cannot be read ({error}). fetch it again, or narrow the pattern."
        ) from error


def _weight(item: Input, span: Span | None = None) -> int:
    """Bytes of text in an input or a part of it."""
    size = item.size
    if compressed.is_compressed(Path(item.place)):
        size *= TEXT_PER_COMPRESSED_BYTE
    if span is None:
        return size
    return max(0, (size if span.stop < 0 else span.stop) - span.start)


def _digest(root: Path, inputs: Sequence[Input], span: Span) -> str:
    path = root / inputs[span.input].place
    if compressed.is_compressed(path):
        return sources.digest_span(path, 0, -1)
    return sources.digest_span(path, span.start, span.stop)


def _grouped(inputs: Sequence[Input], spans: Sequence[Span], unit_bytes: int) -> Iterator[Unit]:
    """Neighbouring spans together until they make a unit."""
    unit: list[Span] = []
    size = 0
    for span in spans:
        weight = _weight(inputs[span.input], span)
        if unit and size + weight > unit_bytes * 5 // 4:
            yield tuple(unit)
            unit, size = [], 0
        unit.append(span)
        size += weight
    if unit:
        yield tuple(unit)


def _texts(recipe: Recipe, root: Path, inputs: Sequence[Input]) -> Iterator[str | Reject]:
    """Documents with text, and rejects, of all inputs."""
    for number, item in enumerate(inputs):
        for text in sources.read_span(
            recipe.format, root, item, Span(number, 0, -1, ""), check=False
        ):
            if isinstance(text, Reject) or (text and not text.isspace()):
                yield text


def sample_texts(recipe: Recipe, root: Path, inputs: Sequence[Input]) -> list[str]:
    """Up to 1 MB of the input's own text, from inputs spread evenly over all.

    Raises UserError when the input holds no readable text at all.
    """
    step = max(1, len(inputs) // _SAMPLED_INPUTS)
    wanted = _SAMPLE_BYTES // min(_SAMPLED_INPUTS, len(inputs))
    sample: list[str] = []
    for item in inputs[::step][:_SAMPLED_INPUTS]:
        size = 0
        for text in _texts(recipe, root, [item]):
            if isinstance(text, Reject):
                size += 1000
            else:
                sample.append(text[: wanted - size + 1])
                size += len(text)
            if size >= wanted:
                break
    if sample:
        return sample
    rejects: list[Reject] = []
    for text in _texts(recipe, root, inputs):
        if not isinstance(text, Reject):
            return [text[:_SAMPLE_BYTES]]
        if len(rejects) < 100:
            rejects.append(text)
    raise UserError(sources.nothing_read(root, len(inputs), rejects))

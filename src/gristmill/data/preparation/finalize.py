"""Committed units to datasets: join small parts, then index, and the manifest last.

    records ──gather──▶ columns ──budget──▶ place and join ──▶ chunks.npy, index.json, manifest.json

Large parts go to their places as they are. Small ones, such as the few validation documents of each
unit, are joined in the order of the units, so that samples are not lost at the ends of many tiny
chunks. Every step can be repeated: a killed finalize is finished by the next.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gristmill.data.preparation import card, summary
from gristmill.data.preparation.plan import Plan
from gristmill.data.preparation.units import REJECTS, SplitRecord, UnitRecord, chunk_name, joins
from gristmill.data.preparation.workspace import NAME as WORKSPACE
from gristmill.data.preparation.workspace import Workspace
from gristmill.data.store import chunk_table, manifest
from gristmill.data.store.chunk_table import ChunkTable, TableBuilder
from gristmill.data.store.chunks import ChunkRecord, index_json, map_chunk, write_chunk
from gristmill.data.store.manifest import Manifest, Source, TokenizerRecord, Totals
from gristmill.tokenizer.engines import EngineChoice
from gristmill.util.errors import RunError, UserError

# Small parts on an object store are fetched this many at a time.
_FETCHES = 16


def finalize(
    plan: Plan, engine: EngineChoice, space: Workspace, max_reject_fraction: float
) -> dict[str, Manifest]:
    """Make the datasets visible; their manifests by split name.

    Raises UserError when too many documents could not be read, or a split has none; everything
    done is kept, and the same command with another limit goes on from there.
    """
    listed = space.scratch() / REJECTS
    job = _Job(tuple(_Parts() for _ in plan.recipe.splits))
    with listed.open("wb") as file:
        for record in space.records(len(plan.units)):
            job.add(record, plan.recipe.chunk_tokens)
            if record.rejects or record.quarantined:
                file.write(space.rejects(record.unit))
    try:
        _check_rejects(job, listed, space, max_reject_fraction)
        _check_splits(plan, job)
    except UserError:
        space.out.put(listed, f"{WORKSPACE}/{REJECTS}")
        # What was damaged may be mended, or could not be read for a moment: it is tried again.
        for unit in job.incomplete:
            space.discard(unit)
        raise
    # With the dataset, so that nobody takes it for records of a corpus.
    first = plan.recipe.splits[0]
    space.out.put(listed, f"{first}/{REJECTS}" if first else REJECTS)
    made = {}
    # Training last: it is the dataset that people look for.
    for number in reversed(range(len(plan.recipe.splits))):
        name = plan.recipe.splits[number]
        made[name] = _finish_split(plan, engine, space, job, number)
    return made


class _Parts:
    """The parts of one split over all units, as columns."""

    def __init__(self) -> None:
        self.documents = 0
        self.text_bytes = 0
        self.units = array("q")
        self.indices = array("q")
        self.joins = array("b")
        self._builder = TableBuilder()

    def __len__(self) -> int:
        return len(self.units)

    def add(self, unit: int, split: SplitRecord, chunk_tokens: int) -> None:
        self.documents += split.documents
        self.text_bytes += split.text_bytes
        self.units.extend([unit] * len(split.parts))
        self.indices.extend(range(len(split.parts)))
        self.joins.extend(joins(split.parts, chunk_tokens))
        for part in split.parts:
            self._builder.add(part)

    def table(self) -> ChunkTable:
        return self._builder.table()


@dataclass
class _Job:
    """What all units hold together."""

    splits: tuple[_Parts, ...]
    rejects: Counter[str] = field(default_factory=Counter)
    empty_documents: int = 0
    filtered: int = 0
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    quarantined_bytes: int = 0
    incomplete: list[int] = field(default_factory=list)
    """Units that leave out something damaged."""

    def add(self, record: UnitRecord, chunk_tokens: int) -> None:
        self.rejects.update(record.rejects)
        self.empty_documents += record.empty_documents
        self.filtered += record.filtered
        if record.quarantined:
            self.incomplete.append(record.unit)
        for left_out in record.quarantined:
            self.quarantined.append((left_out.path, left_out.reason))
            self.quarantined_bytes += left_out.text_bytes
        for parts, split in zip(self.splits, record.splits, strict=True):
            parts.add(record.unit, split, chunk_tokens)

    @property
    def documents(self) -> int:
        return sum(parts.documents for parts in self.splits)

    @property
    def text_bytes(self) -> int:
        return sum(parts.text_bytes for parts in self.splits)


def _finish_split(
    plan: Plan, engine: EngineChoice, space: Workspace, job: _Job, number: int
) -> Manifest:
    recipe, name = plan.recipe, plan.recipe.splits[number]
    place = space.out.below(name) if name else space.out
    if place.exists(manifest.NAME):
        return manifest.read(place)  # an earlier finalize got this far
    parts = job.splits[number]
    table = ChunkTable.of(_placed(plan, space, parts, name))
    identity = table.dataset_id(recipe.dtype)
    finished = Manifest(
        dataset_id=identity,
        dtype=recipe.dtype,
        num_token_ids=recipe.num_token_ids,
        totals=Totals(
            tokens=int(table.tokens.sum()),
            documents=parts.documents,
            chunks=len(table),
            text_bytes=parts.text_bytes,
        ),
        chunk_table=table.digest,
        whole_digests=True,
        tokenizer=TokenizerRecord(
            digest=recipe.tokenizer,
            bos_id=recipe.bos_id,
            eos_id=recipe.eos_id,
            engine=f"{engine.name} {engine.version}",
            parity=engine.parity,
        ),
        source=_source(plan, name, job),
    )
    place.remove_scraps()
    place.remove_scraps("tokenizer")
    for path in sorted(space.tokenizer_dir.iterdir()):
        place.write(f"tokenizer/{path.name}", path.read_bytes())
    index = index_json(table, recipe.dtype, recipe.chunk_tokens, identity)
    place.write(chunk_table.NAME, table.to_bytes())
    place.write("index.json", index.encode())
    place.write(card.NAME, card.text(finished).encode("utf-8", "replace"))
    # The last: it is what makes the dataset one.
    place.write(manifest.NAME, manifest.to_json(finished).encode())
    return finished


def _source(plan: Plan, name: str, job: _Job) -> Source:
    recipe = plan.recipe
    return Source(
        plan=plan.hash,
        layout=recipe.layout,
        seed=recipe.seed,
        chunk_tokens=recipe.chunk_tokens,
        val_fraction=recipe.val_fraction,
        split=name,
        inputs=tuple((item.path, item.size) for item in plan.inputs),
        rejects=dict(sorted(job.rejects.items())),
        empty_documents=job.empty_documents,
        filtered=job.filtered,
        text_field=recipe.text_field,
        separator=recipe.separator,
        filters=recipe.filters,
        map=recipe.map,
        map_digest=recipe.map_digest,
        val_pattern=recipe.val_pattern,
        fast_dev_run=recipe.fast_dev_run,
        quarantined=tuple(job.quarantined),
    )


def _placed(plan: Plan, space: Workspace, parts: _Parts, split: str) -> Iterator[ChunkRecord]:
    """Put every chunk of a split where it belongs; their records in order."""
    table = parts.table()
    members = _joints(parts, table.tokens.tolist(), plan.recipe.chunk_tokens)
    follows = {part for joint in members.values() for part in joint[1:]}
    with ThreadPoolExecutor(_FETCHES) as pool:
        for part in range(len(parts)):
            if part in follows:
                continue
            unit, record = parts.units[part], table[part]
            name = chunk_name(unit, parts.indices[part])
            target = f"{split}/{name}" if split else name
            if part not in members:
                space.place(unit, record.name, target)
                yield replace(record, name=name)
                continue
            joint = members[part]
            places = list(pool.map(lambda p: space.part(parts.units[p], table[p].name), joint))
            made = _join(places, [table[p] for p in joint], space.scratch() / name, plan)
            space.out.put(space.scratch() / name, target)
            if not space.out.is_local:
                for path in places:
                    path.unlink(missing_ok=True)
            yield made


def _joints(parts: _Parts, tokens: Sequence[int], chunk_tokens: int) -> dict[int, list[int]]:
    """The small parts that make a chunk together, by the first of them."""
    members: dict[int, list[int]] = {}
    held, joint = 0, [-1]
    for part, small in enumerate(parts.joins):
        if not small:
            continue
        if not members or held + tokens[part] > chunk_tokens:
            joint, held = [], 0
            members[part] = joint
        joint.append(part)
        held += tokens[part]
    return members


def _join(
    places: Sequence[Path], records: Sequence[ChunkRecord], target: Path, plan: Plan
) -> ChunkRecord:
    """One chunk of several, in their order."""
    dtype = plan.recipe.dtype
    pairs = list(zip(places, records, strict=True))
    # One at a time is open: there can be thousands.
    lengths = [np.diff(map_chunk(path, one, dtype).ends, prepend=0) for path, one in pairs]
    tokens = (map_chunk(path, one, dtype).tokens for path, one in pairs)
    return write_chunk(target, tokens, np.concatenate(lengths), dtype)


def _check_rejects(job: _Job, listed: Path, space: Workspace, limit: float) -> None:
    """Raise UserError when more is left out than the limit allows: of documents, or of text."""
    rejected = sum(job.rejects.values())
    seen = rejected + job.documents + job.empty_documents
    text_bytes = job.quarantined_bytes + job.text_bytes
    share = max(rejected / max(1, seen), job.quarantined_bytes / max(1, text_bytes))
    if share <= limit:
        return
    found = []
    if rejected > limit * seen:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in sorted(job.rejects.items()))
        with listed.open(encoding="utf-8") as file:
            first = json.loads(next(file))["path"]
        found.append(
            f"{rejected:,} of {seen:,} documents could not be read ({reasons}; first in {first})"
        )
    if job.quarantined_bytes > limit * text_bytes:
        path, reason = job.quarantined[0]
        found.append(
            f"{summary.count(len(job.quarantined), 'damaged input')} with "
            f"{job.quarantined_bytes:,} of {text_bytes:,} bytes of text would be left out "
            f"(first {path}: {reason})"
        )
    enough = math.ceil(1000 * share) / 1000
    raise UserError(
        f"{', and '.join(found)}, more than --max_reject_fraction {limit} allows; they are listed "
        f"in {space.out.at(f'{WORKSPACE}/{REJECTS}')}. "
        f"mend or move them away, or accept the loss with --max_reject_fraction {enough} "
        "(the rest is kept and not prepared again).",
        fix={"--max_reject_fraction": enough},
    )


def _check_splits(plan: Plan, job: _Job) -> None:
    for number, name in enumerate(plan.recipe.splits):
        if len(job.splits[number]):
            continue
        if not name:
            raise RunError("no document gave any token. check the tokenizer and the input.")
        if plan.recipe.val_pattern:
            raise UserError(
                f"the files of the {name} side gave no token: --val_pattern "
                f"{plan.recipe.val_pattern!r}. give another pattern."
            )
        raise UserError(
            f"the {name} share is empty: --val_fraction {plan.recipe.val_fraction} of "
            f"{job.documents:,} documents left nothing for it. give another --val_fraction.",
            fix={"--val_fraction": 0.01 if name == "val" else 0.0},
        )

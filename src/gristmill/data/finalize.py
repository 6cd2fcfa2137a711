"""Committed units to datasets: join small parts, then index, and the manifest last.

Large parts are renamed into place. Small ones, such as the few validation documents of each unit,
are joined in the order of the units, so that samples are not lost at the ends of many tiny chunks.
Every step can be repeated: a killed finalize is finished by the next.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gristmill.data import manifest
from gristmill.data.chunks import ChunkRecord, index_json, map_chunk, write_chunk
from gristmill.data.manifest import Manifest, Source, TokenizerRecord, Totals
from gristmill.data.plan import Plan
from gristmill.data.units import REJECTS, SplitRecord, UnitRecord
from gristmill.data.workspace import Workspace, write_atomic
from gristmill.tokenizer.engines import EngineChoice
from gristmill.util.errors import RunError, UserError


@dataclass
class _Chunk:
    """A chunk of the finished dataset and the parts that it is made of, in order."""

    name: str
    tokens: int = 0
    parts: list[tuple[Path, ChunkRecord]] = field(default_factory=list)
    joins: bool = False


def finalize(
    plan: Plan, engine: EngineChoice, space: Workspace, max_reject_fraction: float
) -> dict[str, Manifest]:
    """Make the datasets visible; their manifests by split name.

    Raises UserError when too many documents could not be read, or a split has none; everything
    done is kept, and the same command with another limit goes on from there.
    """
    records = [space.record(unit) for unit in range(len(plan.units))]
    _gather_rejects(plan, space)
    _check_rejects(records, space, max_reject_fraction)
    _check_splits(plan, records)
    # With the dataset, so that nobody takes it for records of a corpus.
    first = space.out / plan.recipe.splits[0]
    first.mkdir(exist_ok=True)
    os.replace(space.folder / REJECTS, first / REJECTS)
    made = {}
    # Training last: it is the dataset that people look for.
    for number in reversed(range(len(plan.recipe.splits))):
        name = plan.recipe.splits[number]
        made[name] = _finish_split(plan, engine, space, records, number)
    return made


def _finish_split(
    plan: Plan,
    engine: EngineChoice,
    space: Workspace,
    records: Sequence[UnitRecord],
    number: int,
) -> Manifest:
    recipe, name = plan.recipe, plan.recipe.splits[number]
    folder = space.out / name
    folder.mkdir(exist_ok=True)
    if (folder / manifest.NAME).is_file():
        return manifest.read(folder)  # an earlier finalize got this far
    layout = _laid_out(space, records, number, recipe.chunk_tokens)
    chunks = tuple(_place(chunk, folder, recipe.dtype) for chunk in layout)
    splits = [record.splits[number] for record in records]
    identity = manifest.dataset_id(chunks, recipe.dtype)
    finished = Manifest(
        dataset_id=identity,
        dtype=recipe.dtype,
        num_token_ids=recipe.num_token_ids,
        totals=_totals(splits, chunks),
        tokenizer=TokenizerRecord(
            digest=recipe.tokenizer,
            bos_id=recipe.bos_id,
            eos_id=recipe.eos_id,
            engine=f"{engine.name} {engine.version}",
            parity=engine.parity,
        ),
        source=_source(plan, name, records),
        chunks=chunks,
    )
    shutil.copytree(space.tokenizer_dir, folder / "tokenizer", dirs_exist_ok=True)
    write_atomic(
        folder / "index.json", index_json(chunks, recipe.dtype, recipe.chunk_tokens, identity)
    )
    write_atomic(folder / manifest.NAME, manifest.to_json(finished))
    return finished


def _source(plan: Plan, name: str, records: Sequence[UnitRecord]) -> Source:
    recipe = plan.recipe
    return Source(
        plan=plan.hash,
        layout=recipe.layout,
        seed=recipe.seed,
        chunk_tokens=recipe.chunk_tokens,
        val_fraction=recipe.val_fraction,
        split=name,
        inputs=tuple((item.path, item.size) for item in plan.inputs),
        rejects=_num_rejects(records),
        empty_documents=sum(record.empty_documents for record in records),
    )


def _totals(splits: Sequence[SplitRecord], chunks: Sequence[ChunkRecord]) -> Totals:
    return Totals(
        tokens=sum(chunk.tokens for chunk in chunks),
        documents=sum(split.documents for split in splits),
        chunks=len(chunks),
        text_bytes=sum(split.text_bytes for split in splits),
    )


def _laid_out(
    space: Workspace, records: Sequence[UnitRecord], number: int, chunk_tokens: int
) -> list[_Chunk]:
    """The chunks of a split, each of one large part or of several small ones."""
    chunks: list[_Chunk] = []
    joint: _Chunk | None = None
    after_cut = False
    for record in records:
        for index, part in enumerate(record.splits[number].parts):
            small = part.tokens < chunk_tokens // 4 and not part.continues and not after_cut
            if not small or joint is None or joint.tokens + part.tokens > chunk_tokens:
                chunks.append(_Chunk(f"chunk-{record.unit:07d}-{index}.bin", joins=small))
                joint = chunks[-1] if small else joint
            target = joint if small and joint is not None else chunks[-1]
            target.parts.append((space.unit_dir(record.unit) / part.name, part))
            target.tokens += part.tokens
            after_cut = part.continues
    return chunks


def _place(chunk: _Chunk, folder: Path, dtype: str) -> ChunkRecord:
    """Put a chunk into the dataset, unless a killed finalize did so before; its record."""
    target = folder / chunk.name
    if not chunk.joins:
        source, part = chunk.parts[0]
        if not target.exists():
            os.replace(source, target)
        return ChunkRecord(
            chunk.name, part.tokens, part.documents, part.bytes, part.xxh3, part.continues
        )
    mapped = [map_chunk(source, part, dtype) for source, part in chunk.parts]
    lengths = np.concatenate([np.diff(m.ends, prepend=0) for m in mapped])
    scrap = chunk.parts[0][0].with_suffix(".joined")
    record = write_chunk(scrap, [m.tokens for m in mapped], lengths, dtype)
    os.replace(scrap, target)
    return ChunkRecord(chunk.name, record.tokens, record.documents, record.bytes, record.xxh3)


def _num_rejects(records: Sequence[UnitRecord]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.rejects)
    return dict(sorted(total.items()))


def _gather_rejects(plan: Plan, space: Workspace) -> None:
    with (space.folder / REJECTS).open("wb") as file:
        for unit in range(len(plan.units)):
            file.write((space.unit_dir(unit) / REJECTS).read_bytes())


def _check_rejects(records: Sequence[UnitRecord], space: Workspace, limit: float) -> None:
    reasons = _num_rejects(records)
    rejected = sum(reasons.values())
    seen = rejected + sum(r.documents + r.empty_documents for r in records)
    if rejected <= limit * seen:
        return
    listed = ", ".join(f"{reason}: {number:,}" for reason, number in reasons.items())
    with (space.folder / REJECTS).open(encoding="utf-8") as file:
        first = json.loads(next(file))["path"]
    enough = math.ceil(1000 * rejected / seen) / 1000
    raise UserError(
        f"{rejected:,} of {seen:,} documents could not be read ({listed}; first in {first}), more "
        f"than --max_reject_fraction {limit} allows; they are listed in {space.folder / REJECTS}. "
        f"mend or move them away, or accept the loss with --max_reject_fraction {enough} "
        "(the rest is kept and not prepared again).",
        fix={"--max_reject_fraction": enough},
    )


def _check_splits(plan: Plan, records: Sequence[UnitRecord]) -> None:
    for number, name in enumerate(plan.recipe.splits):
        if any(record.splits[number].parts for record in records):
            continue
        if not name:
            raise RunError("no document gave any token. check the tokenizer and the input.")
        documents = sum(record.documents for record in records)
        raise UserError(
            f"the {name} share is empty: --val_fraction {plan.recipe.val_fraction} of "
            f"{documents:,} documents left nothing for it. give another --val_fraction.",
            fix={"--val_fraction": 0.01 if name == "val" else 0.0},
        )

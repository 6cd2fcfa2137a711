"""The options of `gristmill prepare` as jobs: one for each dataset that comes out.

A `Recipe` holds what shapes the bytes, and a `Job` what one machine must know besides. Options that
do not fit together are refused here, before anything is read or written.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gristmill.config.commands import Prepare, RayCluster
from gristmill.data.preparation.executors.array import Array, place
from gristmill.data.preparation.executors.local import available_cores
from gristmill.data.preparation.plan import DEFAULT_CHUNK_TOKENS, Recipe
from gristmill.data.raw import inputs as listing
from gristmill.data.raw import layouts
from gristmill.data.raw.documents import Input, OnError
from gristmill.data.raw.select import load_map, map_digest
from gristmill.data.storage import Storage
from gristmill.data.store.chunks import dtype_for
from gristmill.tokenizer.engines import Requested
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

Executor = int | Array | RayCluster
"""Who runs the units: this many processes here, a rank of an array, or a Ray cluster."""


@dataclass
class Job:
    """A preparation as one machine sees it: what `Plan` must not depend on is here."""

    recipe: Recipe
    root: Storage
    inputs: Sequence[Input]
    out: Storage
    tokenizer: Tokenizer
    engine: Requested = "auto"
    on_error: OnError = "skip"
    max_reject_fraction: float = 0.001
    executor: Executor = 1
    overwrite: bool = False


def jobs(cfg: Prepare) -> dict[str, Job]:
    """The jobs that the options mean, by the name of their dataset (empty: the only one).

    Raises UserError for what cannot work.
    """
    layout = layouts.get(cfg.layout or "")
    source, out, tokenizer_dir = _paths(cfg, layout)
    if not 0 <= cfg.max_reject_fraction <= 1:
        raise UserError(
            f"--max_reject_fraction {cfg.max_reject_fraction} is no share. give 0 to 1."
        )
    if cfg.map is not None:
        load_map(cfg.map)
    executor = _executor(cfg)
    sets = layouts.sets(layout, pattern=cfg.pattern, split=cfg.split, sample=cfg.sample)
    found = _inputs(source, sets, out)
    tokenizer = Tokenizer.load(tokenizer_dir)
    recipe = recipe_for(
        layout,
        tokenizer,
        text_field=cfg.text_field,
        separator=cfg.separator,
        filters=cfg.filter,
        map_function=cfg.map,
        bos=cfg.bos,
        eos=cfg.eos,
        chunk_tokens=cfg.chunk_tokens,
        val_fraction=cfg.val_fraction,
        val_pattern=cfg.val_pattern,
        fast_dev_run=cfg.fast_dev_run,
        seed=cfg.seed,
    )
    job = Job(
        recipe=recipe,
        root=listing.root_of(source),
        inputs=(),
        out=out,
        tokenizer=tokenizer,
        engine=cfg.engine,
        on_error=cfg.on_error,
        max_reject_fraction=cfg.max_reject_fraction,
        executor=executor,
        overwrite=cfg.overwrite,
    )
    return {
        name: replace(job, inputs=inputs, out=out.below(name) if name else out)
        for name, inputs in found.items()
    }


def recipe_for(
    layout: layouts.Layout,
    tokenizer: Tokenizer,
    *,
    text_field: str | None = None,
    separator: str | None = None,
    filters: Mapping[str, Any] | None = None,
    map_function: str | None = None,
    bos: str | int = "auto",
    eos: str | int = "auto",
    chunk_tokens: int | str = "auto",
    **others: Any,
) -> Recipe:
    """The options that shape a dataset, with every `auto` resolved; `others` as in `Recipe`."""
    if layout.records == "records" and separator is not None:
        raise UserError(
            f"--separator {separator!r} parts text files; in {layout.name} a record is a document. "
            "leave it out.",
            {"--separator": None},
        )
    if layout.records == "text":
        _refuse_fields(layout, text_field, filters)
    frame = layouts.frame(
        layout,
        bos=bos,
        eos=eos,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        num_token_ids=tokenizer.num_token_ids,
    )
    return Recipe(
        layout=layout.name,
        records=layout.records,
        # What a layout does not use must not make a different job.
        text_field=(text_field or layout.text_field) if layout.records == "records" else "",
        separator=separator,
        filters={**layout.filters, **(filters or {})},
        map=map_function,
        map_digest=None if map_function is None else map_digest(map_function),
        tokenizer=tokenizer.digest,
        num_token_ids=tokenizer.num_token_ids,
        bos_id=frame.bos_id,
        eos_id=frame.eos_id,
        dtype=dtype_for(tokenizer.num_token_ids),
        chunk_tokens=DEFAULT_CHUNK_TOKENS if isinstance(chunk_tokens, str) else chunk_tokens,
        **others,
    )


def _paths(cfg: Prepare, layout: layouts.Layout) -> tuple[str, Storage, str]:
    """Input, output and tokenizer. Raises UserError when one is not given, or they overlap."""
    for option in ("input_dir", "output_dir", "tokenizer_dir"):
        if getattr(cfg, option) is None:
            raise UserError(
                f"--{option} is missing. for example: gristmill prepare {layout.name} "
                "--input_dir TEXT --output_dir OUT --tokenizer_dir TOKENIZER"
            )
    assert cfg.input_dir is not None
    assert cfg.output_dir is not None
    assert cfg.tokenizer_dir is not None
    out = Storage(cfg.output_dir)
    source = Storage(cfg.input_dir)
    if _is_inside(source, out):
        raise UserError(
            f"the input {source.root} lies in the output {out.root}, which holds nothing but the "
            "dataset. name another --output_dir."
        )
    return cfg.input_dir, out, cfg.tokenizer_dir


def _is_inside(inner: Storage, outer: Storage) -> bool:
    """Whether `inner` is `outer` or below it."""
    if inner.is_local != outer.is_local:
        return False
    if inner.is_local:
        return inner.path.resolve().is_relative_to(outer.path.resolve())
    return f"{inner.root}/".startswith(f"{outer.root}/")


def _inputs(source: str, sets: Mapping[str, str], out: Storage) -> dict[str, list[Input]]:
    """The input files of every set that has some; which have none is said."""
    found = {}
    missing = {}
    for name, pattern in sets.items():
        try:
            found[name] = listing.list_inputs(source, pattern, exclude=[out.root])
        except UserError as error:
            if len(sets) == 1:
                raise
            missing[name] = str(error).partition(". ")[0]
    if not found:
        raise UserError(
            f"{source} holds none of the sets ({', '.join(f'{n}: {p}' for n, p in sets.items())}). "
            "check --input_dir, or name the layout that fits (`gristmill prepare list`)."
        )
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    return found


def _executor(cfg: Prepare) -> Executor:
    """Who runs the units. Raises UserError for options of another executor."""
    for options, value in (
        (("rank", "world"), "array"),
        (("ray",), "ray"),
    ):
        given = [n for n in options if getattr(cfg, n) not in ("auto", RayCluster())]
        if given and cfg.executor != value:
            raise UserError(
                f"--{given[0]} is for --executor {value}; this is {cfg.executor}. "
                f"leave it out, or add --executor {value}.",
                {"--executor": value},
            )
    if cfg.executor == "ray":
        if cfg.num_workers != "auto":
            raise UserError(
                f"--num_workers {cfg.num_workers} is for processes of this machine; on Ray give "
                "--ray.num_cpus and --ray.max_in_flight.",
                {"--num_workers": None},
            )
        return cfg.ray
    workers = available_cores() if isinstance(cfg.num_workers, str) else cfg.num_workers
    if workers < 1:
        raise UserError(f"--num_workers {workers} is too few. give 1 or more, or auto.")
    if cfg.executor == "local":
        return workers
    if cfg.overwrite:
        raise UserError(
            "--overwrite cannot be used by several processes at once. remove the output first, or "
            "name another --output_dir.",
            {"--overwrite": None},
        )
    return Array(*place(cfg.rank, cfg.world), workers)


def _refuse_fields(
    layout: layouts.Layout, text_field: str | None, filters: Mapping[str, Any] | None
) -> None:
    """Raise UserError for options that speak of fields where there are none."""
    given: tuple[tuple[str, object], ...] = (("text_field", text_field), ("filter", filters))
    for option, value in given:
        if value and value != "text":
            raise UserError(
                f"--{option} {value} speaks of fields of records; {layout.name} has none. "
                "leave it out, or choose the layout jsonl.",
                {f"--{option}": None},
            )

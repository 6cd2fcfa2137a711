"""Raw text to a dataset: plan, run, finalize. Start reading here.

    inputs ──plan──▶ units ──run──▶ committed units ──finalize──▶ chunks, index.json, manifest.json

The plan cuts the inputs into units and its hash names the job (`plan.py`). A unit is a pure
function of the plan (`units.py`), run by any process in any order (`executors.py`) and committed by
a rename (`workspace.py`). What is left to do is the plan minus the committed units, so that the
same command continues a killed job, and the bytes written are always the same. Finalize writes the
manifest last (`finalize.py`): a dataset that can be seen is complete.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gristmill.config.commands import Prepare
from gristmill.data import layouts, sources, summary
from gristmill.data.chunks import dtype_for
from gristmill.data.executors import disk_error, run_here, run_local
from gristmill.data.finalize import finalize
from gristmill.data.manifest import Manifest
from gristmill.data.plan import DEFAULT_CHUNK_TOKENS, Plan, Recipe, make_plan, sample_texts
from gristmill.data.progress import Meter
from gristmill.data.workspace import Workspace, check_replaceable, datasets_in
from gristmill.tokenizer.engines import EngineChoice, Requested, choose_engine
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import Interrupted, RunError, UserError


def prepare(cfg: Prepare) -> None:
    """Write the dataset that the options describe, or go on with it. Prints what came out."""
    if cfg.layout in (None, "list"):
        print("\n".join(layouts.names()))
        return
    started = time.monotonic()
    job = _job(cfg)
    plan = make_plan(job.recipe, job.root, job.inputs)
    _finish_swap(job.out)
    made = datasets_in(job.out) if _is_finished(plan, job.out, overwrite=cfg.overwrite) else None
    if made:
        print(f"{job.out} is finished already: nothing to do (--overwrite prepares it anew).")
    else:
        made = build(plan, job)
    seconds = time.monotonic() - started
    print(summary.text(job.out, made, seconds))


@dataclass
class Job:
    """A preparation as one machine sees it: what `Plan` must not depend on is here."""

    recipe: Recipe
    root: Path
    inputs: Sequence[sources.Input]
    out: Path
    tokenizer: Tokenizer
    engine: Requested = "auto"
    num_workers: int | str = "auto"
    max_reject_fraction: float = 0.001
    overwrite: bool = False


def build(plan: Plan, job: Job) -> dict[str, Manifest]:
    """Do what is left of the plan; the manifests of the finished datasets by split name."""
    replaced = job.overwrite and bool(datasets_in(job.out))
    # Readers may have the old chunks mapped: a replacement is built beside and swapped in.
    out = _beside(job.out, "new") if replaced else job.out
    space = Workspace(out)
    try:
        with space.locked():
            made = datasets_in(out)
            # Whoever held the lock may have finished it.
            if space.stored() or not _are_of(made, plan):
                engine = _begin(plan, job, space)
                missing = sorted(set(range(len(plan.units))) - space.committed())
                _check_disk(plan, missing, out)
                _run(plan, job, space, missing)
                made = finalize(plan, engine, space, job.max_reject_fraction)
                space.close()
    except OSError as error:
        raise disk_error(error, out) from error
    if replaced:
        _swap(out, job.out)
    return made


def _job(cfg: Prepare) -> Job:
    """The job that the options mean. Raises UserError for what cannot work."""
    layout = layouts.get(cfg.layout or "")
    for option in ("input_dir", "output_dir", "tokenizer_dir"):
        if getattr(cfg, option) is None:
            raise UserError(
                f"--{option} is missing. for example: gristmill prepare {layout.name} "
                "--input_dir TEXT --output_dir OUT --tokenizer_dir TOKENIZER"
            )
    assert cfg.input_dir is not None
    assert cfg.output_dir is not None
    assert cfg.tokenizer_dir is not None
    source, out = Path(cfg.input_dir).expanduser(), Path(cfg.output_dir).expanduser()
    tokenizer = Tokenizer.load(cfg.tokenizer_dir)
    inputs = sources.list_inputs(source, cfg.pattern or layout.pattern, exclude=[out])
    if not 0 <= cfg.max_reject_fraction <= 1:
        raise UserError(
            f"--max_reject_fraction {cfg.max_reject_fraction} is no share. give 0 to 1."
        )
    recipe = recipe_for(
        layout,
        tokenizer,
        text_field=cfg.text_field or "text",
        separator=cfg.separator,
        bos=cfg.bos,
        eos=cfg.eos,
        chunk_tokens=cfg.chunk_tokens,
        val_fraction=cfg.val_fraction,
        seed=cfg.seed,
    )
    return Job(
        recipe=recipe,
        root=sources.root_of(source),
        inputs=inputs,
        out=out,
        tokenizer=tokenizer,
        engine=cfg.engine,
        num_workers=cfg.num_workers,
        max_reject_fraction=cfg.max_reject_fraction,
        overwrite=cfg.overwrite,
    )


def recipe_for(
    layout: layouts.Layout,
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    separator: str | None = None,
    bos: str | int = "auto",
    eos: str | int = "auto",
    chunk_tokens: int | str = "auto",
    val_fraction: float = 0.0,
    seed: int = 42,
) -> Recipe:
    """The options that shape a dataset, with every `auto` resolved."""
    if layout.records == "jsonl" and separator is not None:
        raise UserError(
            f"--separator {separator!r} parts text files; in {layout.name} a line is a document. "
            "leave it out.",
            {"--separator": None},
        )
    if layout.records == "text" and text_field != "text":
        raise UserError(
            f"--text_field {text_field} names a field of records; {layout.name} has none. "
            "leave it out, or choose the layout jsonl.",
            {"--text_field": None},
        )
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
        # What a layout does not use must not make a different job.
        text_field=text_field if layout.records == "jsonl" else "",
        separator=separator if layout.records == "text" else None,
        tokenizer=tokenizer.digest,
        num_token_ids=tokenizer.num_token_ids,
        bos_id=frame.bos_id,
        eos_id=frame.eos_id,
        dtype=dtype_for(tokenizer.num_token_ids),
        chunk_tokens=DEFAULT_CHUNK_TOKENS if isinstance(chunk_tokens, str) else chunk_tokens,
        val_fraction=val_fraction,
        seed=seed,
    )


def _is_finished(plan: Plan, out: Path, *, overwrite: bool) -> bool:
    """Whether `out` holds this job's result. Raises UserError for another job's."""
    if overwrite:
        check_replaceable(out)
        return False
    found = datasets_in(out)
    if _are_of(found, plan):
        return True
    begun = Workspace(out).stored()
    if begun["hash"] != plan.hash if begun else found:
        what = "the unfinished work" if begun else "the dataset"
        raise UserError(
            f"{out} holds {what} of another job: input, options or tokenizer differ. "
            "name another --output_dir, or replace it with --overwrite."
        )
    check_replaceable(out)
    return False


def _are_of(found: dict[str, Manifest], plan: Plan) -> bool:
    """Whether these are all the datasets that the plan makes."""
    plans = {m.source.plan if m.source else "" for m in found.values()}
    return set(found) == set(plan.recipe.splits) and plans == {plan.hash}


def _begin(plan: Plan, job: Job, space: Workspace) -> EngineChoice:
    """Set up the working directory, or find it as it was left; the engine of the job."""
    sample = sample_texts(plan.recipe, job.root, job.inputs)
    engine = choose_engine(job.tokenizer, job.engine, sample)
    if engine.note:
        print(f"encoding with {engine.name} {engine.version}: {engine.note}", file=sys.stderr)
    if (begun := space.stored()) is not None:
        _, earlier = space.load()
        same = (earlier.name, earlier.version) == (engine.name, engine.version)
        if begun["hash"] == plan.hash and same:
            done = len(space.committed())
            print(f"going on: {done} of {len(plan.units)} parts are done", file=sys.stderr)
            (space.folder / "tmp").mkdir(exist_ok=True)
            return engine
    space.wipe()
    job.tokenizer.save(space.tokenizer_dir)
    space.start(plan, engine)
    return engine


def _run(plan: Plan, job: Job, space: Workspace, units: Sequence[int]) -> None:
    """Run the units that are missing, on as many processes as there is work for."""
    workers = _available_cores() if isinstance(job.num_workers, str) else job.num_workers
    if workers < 1:
        raise UserError(f"--num_workers {workers} is too few. give 1 or more, or auto.")
    with Meter({unit: plan.text_bytes(unit) for unit in units}) as meter:
        try:
            if len(units) == 1:
                run_here(space, job.root, units, meter.update)
            else:
                run_local(space, job.root, units, min(workers, len(units)), meter.update)
        except KeyboardInterrupt:
            done = len(space.committed())
            raise Interrupted(
                signal.SIGINT,
                f"interrupted: {done} of {len(plan.units)} parts are done. "
                "the same command goes on from there.",
            ) from None


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_disk(plan: Plan, units: Sequence[int], out: Path) -> None:
    """Raise RunError when what is left will not fit on the disk."""
    width = 2 if plan.recipe.dtype == "uint16" else 4
    # Three bytes of text a token is few for most languages; better to refuse than to run out.
    needed = sum(plan.text_bytes(unit) for unit in units) // 3 * width
    free = shutil.disk_usage(out).free
    if needed > free:
        raise RunError(
            f"no space left for {out}: about {needed / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free. free some, or name another --output_dir."
        )


def _swap(new: Path, out: Path) -> None:
    """Put a finished directory in the place of an old one."""
    old = _beside(out, "old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


def _finish_swap(out: Path) -> None:
    """Put `out` back where a swap was killed between its two renames."""
    if not out.exists() and _beside(out, "old").exists():
        os.rename(_beside(out, "new"), out)
        shutil.rmtree(_beside(out, "old"), ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")

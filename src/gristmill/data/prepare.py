"""Raw text to a dataset: plan, run, finalize. Start reading here.

    inputs ──plan──▶ units ──run──▶ committed units ──finalize──▶ chunks, index.json, manifest.json

The options become jobs (`job.py`). The plan cuts the inputs into units and its hash names the job
(`plan.py`). A unit is a pure function of the plan (`units.py`), run by any process in any order
(`executors/`) and committed by one rename or one PUT (`workspace.py`). What is left to do is the
plan minus the committed units, so that the same command continues a killed job, and the bytes
written are always the same. Finalize writes the manifest last (`finalize.py`): a dataset that can
be seen is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from gristmill.config.commands import Prepare
from gristmill.data.look.page import size
from gristmill.data.preparation import status, summary
from gristmill.data.preparation.executors import Failure, Task, array, local
from gristmill.data.preparation.executors.array import Array
from gristmill.data.preparation.executors.work import write_error
from gristmill.data.preparation.finalize import finalize
from gristmill.data.preparation.finished import REMOVE, Made, finished
from gristmill.data.preparation.job import Job, jobs
from gristmill.data.preparation.plan import Plan, make_plan, sample_texts
from gristmill.data.preparation.progress import Meter
from gristmill.data.preparation.swap import beside, finish_swap, swap
from gristmill.data.preparation.workspace import JOB, Workspace, check_replaceable, datasets_in
from gristmill.data.raw import layouts, sources
from gristmill.data.storage import Storage
from gristmill.tokenizer.engines import EngineChoice, choose_engine
from gristmill.util.errors import Interrupted, RunError, UserError

_SHOWN_FAILURES = 10
# Less than this in one unit is done sooner than another process is started.
_LITTLE_BYTES = 16 << 20


def prepare(cfg: Prepare) -> None:
    """Write the dataset that the options describe, or go on with it. Prints what came out."""
    if cfg.layout in (None, "list"):
        print("\n".join(layouts.names()))
    elif cfg.layout == "status":
        status.show(cfg.output_dir)
    else:
        sets = jobs(cfg)
        made = []
        for job in sets.values():
            try:
                made.append(_prepare(job, following=len(sets) == 1))
            except BrokenPipeError:
                raise  # whoever read what is printed has left
            except OSError as error:
                raise write_error(error, job.out) from error
        if len(sets) > 1 and all(made):
            print(summary.next_of_sets(cfg.layout, str(cfg.output_dir)))


def _prepare(job: Job, *, following: bool) -> bool:
    """Do one job and print what came out, with `following` also what follows; whether it is done.

    It is not where other ranks have to finish it.
    """
    started = time.monotonic()
    plan = make_plan(job.recipe, job.root, job.inputs)
    if job.out.is_local:
        finish_swap(job.out.path.resolve())
    made = {} if job.overwrite else finished(plan, job.out)
    if made:
        Workspace.open(job.out).close()  # what a process that was killed at its end has left
        again = "--overwrite prepares" if job.out.is_local else "removing it prepares"
        print(f"{job.out.root} is finished already: nothing to do ({again} it anew).")
        print(summary.text(job.out, made, None, following=following))
        return True
    is_whole = not _space(job)[0].committed()
    if made := build(plan, job):
        seconds = time.monotonic() - started
        print(summary.text(job.out, made, seconds, is_whole=is_whole, following=following))
    return bool(made)


def build(plan: Plan, job: Job) -> Made:
    """Do what is left of the plan; the finished datasets, none where other ranks have to finish."""
    space, replaces = _space(job)
    try:
        with space.locked(shared=isinstance(job.executor, Array)):
            failures = []
            if not finished(plan, space.out, overwrite=job.overwrite):
                _begin(plan, job, space)
                missing = _missing(plan, space)
                _check_disk(plan, missing, space.out)
                failures = _run(plan, job, space, missing)
        with space.locked():
            # Another process may have finished it since.
            made = finished(plan, space.out, overwrite=job.overwrite)
            if not made:
                _raise(failures, plan)
                if left := _missing(plan, space):
                    print(_not_the_last(job, len(left), plan))
                    return {}
                space.out.remove_scraps()
                made = finalize(plan, space.engine(), space, job.max_reject_fraction)
                space.out.write(JOB, json.dumps({"job": plan.job}).encode() + b"\n")
            space.close()
            if replaces:
                swap(space.out.path, job.out.path.resolve())
    except BrokenPipeError:
        raise  # whoever read what is printed has left
    except OSError as error:
        # On an object store nothing holds back another process that finishes the same job.
        made = finished(plan, space.out) if isinstance(error, FileNotFoundError) else {}
        if not made:
            raise write_error(error, space.out) from error
    return made


def _space(job: Job) -> tuple[Workspace, bool]:
    """Where the job is done, and whether that is beside a dataset that it then replaces."""
    if not (job.overwrite and datasets_in(job.out)):
        return Workspace.open(job.out), False
    check_replaceable(job.out)
    if not job.out.is_local or os.path.ismount(job.out.path):
        what = "a mounted disk" if job.out.is_local else "an object store"
        raise UserError(
            f"{job.out.root} holds a finished dataset, and {what} cannot put another in its place "
            f"whole. {REMOVE}",
            {"--overwrite": None},
        )
    # Readers may have the old chunks mapped: a replacement is built beside and swapped in.
    return Workspace.open(Storage(beside(job.out.path.resolve(), "new"))), True


def _begin(plan: Plan, job: Job, space: Workspace) -> None:
    """Set up the working directory, or find it as it was left."""
    sample = sample_texts(plan.recipe, job.root, job.inputs)
    engine = choose_engine(job.tokenizer, job.engine, sample)
    if engine.note:
        _note(f"encoding with {engine.name} {engine.version}; {engine.note}")
    if cut := sources.cut_short(plan.recipe.format, job.root, plan.inputs):
        _note(
            f"cut short, without a parquet footer: {len(cut):,} of "
            f"{summary.count(len(plan.inputs), 'input')} (first {cut[0]}). "
            "what is whole is prepared; fetch the others again."
        )
    begun = space.stored()
    is_shared = isinstance(job.executor, Array)
    # In an array the first rank's choice counts; one that lacks its engine says so.
    if begun and begun["job"] == plan.job and (is_shared or _same(space.engine(), engine)):
        if done := len(space.committed()):
            _note(f"going on: {done} of {len(plan.units)} parts are done")
        return
    if begun and not is_shared:  # what other ranks have begun must stay
        space.wipe()
    space.start(plan, engine, job.tokenizer)


def _note(text: str) -> None:
    """Say something on the way. Nobody may be reading it any more; the work goes on."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr)


def _same(one: EngineChoice, other: EngineChoice) -> bool:
    return (one.name, one.version) == (other.name, other.version)


def _missing(plan: Plan, space: Workspace) -> list[int]:
    return sorted(set(range(len(plan.units))) - space.committed())


def _run(plan: Plan, job: Job, space: Workspace, units: Sequence[int]) -> list[Failure]:
    """Run the units that are missing; those that could not be done."""
    executor = job.executor
    task = Task(_anywhere(space.out), _anywhere(job.root), job.on_error)
    if isinstance(executor, Array):
        units = array.mine(units, executor)
    if not units:
        return []
    with Meter({unit: plan.text_bytes(unit) for unit in units}) as meter:
        try:
            with _stoppable():
                if isinstance(executor, int):
                    if len(plan.units) == 1 and plan.text_bytes(0) <= _LITTLE_BYTES:
                        return local.run_here(task, units, meter.update)
                    return local.run(task, units, executor, meter.update)
                if isinstance(executor, Array):
                    return local.run(task, units, executor.num_workers, meter.update)
                from gristmill.data.preparation.executors import ray as cluster

                return cluster.run(task, units, executor, meter.update)
        except KeyboardInterrupt as stop:
            done = len(space.committed())
            raise Interrupted(
                stop.args[0] if stop.args else signal.SIGINT,
                f"interrupted: {done} of {len(plan.units)} parts are done. "
                "the same command goes on from there.",
            ) from None


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, by which schedulers end jobs, is as good as Ctrl-C: workers end in good order."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _anywhere(storage: Storage) -> str:
    """The root for workers, whose working directory may be another one."""
    return os.path.abspath(storage.root) if storage.is_local else storage.root


def _raise(failures: Sequence[Failure], plan: Plan) -> None:
    """Raise RunError when units could not be done, with their files."""
    if not failures:
        return
    lines: dict[str, None] = {}
    for failure in failures:
        paths = [plan.inputs[span.input].path for span in plan.units[failure.unit]]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        is_named = any(path in failure.message for path in paths)
        where = "" if is_named else f"{', '.join(paths[:3])}{more}: "
        lines[f"  {where}{failure.message}"] = None  # the parts of one file say the same
    shown = list(lines)[:_SHOWN_FAILURES]
    if len(lines) > len(shown):
        shown.append(f"  and {len(lines) - len(shown)} more like these.")
    raise RunError(
        f"{len(failures)} of {len(plan.units)} parts could not be prepared, the others are done:\n"
        + "\n".join(shown)
    )


def _not_the_last(job: Job, left: int, plan: Plan) -> str:
    rank = job.executor.rank if isinstance(job.executor, Array) else 0
    return (
        f"rank {rank} has done its share; {left} of {len(plan.units)} parts are left to other "
        "ranks. the last one to finish completes the dataset "
        f"(gristmill prepare status {job.out.root})."
    )


def _check_disk(plan: Plan, units: Sequence[int], out: Storage) -> None:
    """Raise RunError when what is left will not fit on the disk."""
    if not out.is_local:
        return
    width = 2 if plan.recipe.dtype == "uint16" else 4
    # Three bytes of text a token is few for most languages; better to refuse than to run out.
    needed = sum(plan.text_bytes(unit) for unit in units) // 3 * width
    free = shutil.disk_usage(out.path).free
    if needed > free:
        raise RunError(
            f"no space left for {out.root}: about {size(needed)} are needed, "
            f"{size(free)} are free. free some, or name another --output_dir."
        )

"""Whether an output holds this job's datasets already, nothing yet, or something else."""

from __future__ import annotations

import json

from gristmill.data.preparation.plan import Plan
from gristmill.data.preparation.workspace import JOB, Workspace, check_replaceable, datasets_in
from gristmill.data.storage import Storage
from gristmill.data.store.manifest import Manifest
from gristmill.util.errors import UserError

Made = dict[str, Manifest]
"""The finished datasets of a job by split name ("" when there is no split)."""

_SHAPING = {
    "layout": "layout",
    "fast_dev_run": "--fast_dev_run",
    "text_field": "--text_field",
    "separator": "--separator",
    "filters": "--filter",
    "map": "--map",
    "val_fraction": "--val_fraction",
    "val_pattern": "--val_pattern",
    "seed": "--seed",
}
"""Options that are in a manifest and in a recipe, and what users call them."""

REMOVE = "name another --output_dir, or remove this one first."


def finished(plan: Plan, out: Storage, *, overwrite: bool = False) -> Made:
    """The datasets of this plan in `out` if they are all finished, else none.

    Raises UserError when something else is in the way, with `overwrite` only other people's files.
    """
    found, begun = datasets_in(out), Workspace.open(out).stored()
    if _are_of(found, plan, noted := _noted(out)) and (begun is None or noted == plan.job):
        return found
    if not overwrite:
        if begun and begun["job"] != plan.job:
            raise _another(out, "the unfinished work", plan, begun["hash"], {}, replaceable=True)
        if found and not begun:
            hashes = _plans(found)
            name = hashes.pop() if len(hashes) == 1 else ""
            raise _another(out, "the dataset", plan, name, found, replaceable=out.is_local)
    check_replaceable(out)
    return {}


def _another(
    out: Storage, what: str, plan: Plan, name: str, found: Made, *, replaceable: bool
) -> UserError:
    changed = (
        "input files have changed since"
        if name == plan.hash
        else (_differences(found, plan) or "input, options or tokenizer differ")
    )
    text = f"{out.root} holds {what} of another job: {changed}."
    if not replaceable:
        return UserError(f"{text} {REMOVE}")
    return UserError(
        f"{text} name another --output_dir, or replace it with --overwrite.",
        {"--overwrite": True},
    )


def _differences(found: Made, plan: Plan) -> str:
    """In what the datasets found differ from those of the plan, in words; "" where unknown."""
    if not found:
        return ""
    manifest = next(iter(found.values()))
    source, made, wanted = manifest.source, manifest.tokenizer, plan.recipe
    if source is None or made is None:
        return ""
    differ = [
        option
        for name, option in _SHAPING.items()
        if getattr(source, name) != getattr(wanted, name)
    ]
    if made.digest != wanted.tokenizer:
        differ.append("tokenizer")
    elif (made.bos_id, made.eos_id) != (wanted.bos_id, wanted.eos_id):
        differ.append("--bos or --eos")
    # What follows from another option would only distract from it.
    if source.fast_dev_run == wanted.fast_dev_run:
        inputs = sorted((item.path, item.size) for item in plan.inputs)
        if sorted(source.inputs) != inputs:
            differ.append("input files")
        elif source.chunk_tokens != wanted.chunk_tokens:
            differ.append("--chunk_tokens")
    return f"other {', '.join(differ)}" if differ else ""


def _are_of(found: Made, plan: Plan, noted: str | None) -> bool:
    """Whether these are all the datasets that the plan makes, of inputs as they are now."""
    # A copy may lack the hidden file.
    same = noted in (None, plan.job)
    return same and set(found) == set(plan.recipe.splits) and _plans(found) == {plan.hash}


def _noted(out: Storage) -> str | None:
    """The job that was noted when all was finished."""
    try:
        return str(json.loads(out.read(JOB))["job"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def _plans(found: Made) -> set[str]:
    return {m.source.plan if m.source else "" for m in found.values()}

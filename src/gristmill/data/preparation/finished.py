"""Whether an output holds this job's datasets already, nothing yet, or something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.data.preparation.plan import Plan, Recipe
from gristmill.data.preparation.workspace import JOB, Workspace, check_replaceable, datasets_in
from gristmill.data.storage import Storage
from gristmill.data.store.manifest import Manifest, Source
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
    "map_digest": "code of --map",
    "val_fraction": "--val_fraction",
    "val_pattern": "--val_pattern",
    "seed": "--seed",
}
"""Options that are in a manifest and in a recipe, and what users call them."""

_CHANGED = "input files have changed since"
_UNKNOWN = "input, options or tokenizer differ"

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
            raise _another(out, "the unfinished work", _unfinished_differs(out, plan, begun), True)
        if found and not begun:
            changed = _CHANGED if _plans(found) == {plan.hash} else _dataset_differs(found, plan)
            raise _another(out, "the dataset", changed, out.is_local)
    check_replaceable(out)
    return {}


def _another(out: Storage, what: str, differs: str, replaceable: bool) -> UserError:
    text = f"{out.root} holds {what} of another job: {differs}."
    if not replaceable:
        return UserError(f"{text} {REMOVE}")
    return UserError(
        f"{text} name another --output_dir, or replace it with --overwrite.",
        {"--overwrite": True},
    )


def _unfinished_differs(out: Storage, plan: Plan, begun: Mapping[str, Any]) -> str:
    """In what the work that was begun in `out` differs from the plan, in words."""
    if begun["hash"] == plan.hash:
        return _CHANGED
    try:
        made = Workspace.open(out).load()[0].recipe
    except (OSError, ValueError, KeyError, TypeError):  # another version's, or going just now
        return _UNKNOWN
    return _other(_options(made, plan.recipe))


def _dataset_differs(found: Made, plan: Plan) -> str:
    """In what the datasets found differ from those of the plan, in words."""
    manifest = next(iter(found.values()))
    source, made, wanted = manifest.source, manifest.tokenizer, plan.recipe
    if source is None or made is None:
        return _UNKNOWN
    differ = _options(source, wanted)
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
    return _other(differ)


def _options(made: Source | Recipe, wanted: Recipe) -> list[str]:
    """The options that differ."""
    return [
        option for name, option in _SHAPING.items() if getattr(made, name) != getattr(wanted, name)
    ]


def _other(differ: Sequence[str]) -> str:
    return f"other {', '.join(differ)}" if differ else _UNKNOWN


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

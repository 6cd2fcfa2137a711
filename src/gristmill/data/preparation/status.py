"""How far preparations are, told from what is committed; it disturbs nobody, from any machine."""

from __future__ import annotations

import os
from collections import Counter

from gristmill.data.preparation import summary
from gristmill.data.preparation.swap import beside
from gristmill.data.preparation.workspace import JOB, NAME, Workspace, datasets_in
from gristmill.data.storage import Storage
from gristmill.data.store import manifest
from gristmill.util.errors import UserError

_JOB = f"{NAME}/job.json"


def show(out: str | None) -> None:
    """Print how far the preparation in `out` is; a corpus of several sets has a line for each.

    Raises UserError where nothing is or was prepared.
    """
    if out is None:
        raise UserError("which output? for example: gristmill prepare status OUT")
    try:
        places = _places(Storage(out))
    except OSError as error:  # a bucket that is not there, a store that is not reached
        raise UserError(
            f"{out} cannot be read ({error}). check the URL, and the credentials of its store."
        ) from error
    for place in places:
        try:
            print(text(place))
        except FileNotFoundError:
            print(text(place))  # it was completed while we looked


def text(out: Storage) -> str:
    """What there is in `out`: the finished dataset, or how much of it."""
    space = Workspace.open(out)
    if space.stored() is None or out.exists(JOB):
        return "finished: " + summary.text(out, datasets_in(out), None, following=False)
    plan, engine = space.load()
    done = sorted(space.committed() & set(range(len(plan.units))))
    documents = tokens = num_rejects = 0
    reasons: Counter[str] = Counter()
    for record in space.records_of(done):
        documents += record.documents
        tokens += record.tokens
        reasons.update(record.rejects)
        num_rejects += sum(record.rejects.values())
    total = sum(plan.text_bytes(unit) for unit in range(len(plan.units)))
    read = sum(plan.text_bytes(unit) for unit in done)
    lines = [
        f"{out.root}: {len(done):,} of {len(plan.units):,} parts done "
        f"({read / max(1, total):.0%}), {summary.count(documents, 'document')}, {tokens:,} tokens; "
        f"{(total - read) / 1e6:,.0f} MB of text left (encoding with {engine.name})"
    ]
    if num_rejects:
        listed = ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))
        lines.append(f"  left out, unreadable: {summary.count(num_rejects, 'document')} ({listed})")
    if len(done) == len(plan.units):
        lines.append("  all parts are done: the prepare command completes the dataset.")
    return "\n".join(lines)


def _places(out: Storage) -> list[Storage]:
    """Where something is or was prepared: `out`, the set folders in it, replacements beside."""
    candidates = [out]
    if out.is_local:
        candidates.append(Storage(beside(out.path.resolve(), "new")))
    found = [place for place in candidates if _is_one(place)]
    if not found:
        folders = _folders(out)
        found = [out.below(name) for name in folders if _is_one(out.below(name))]
    if not found:
        raise UserError(
            f"{out.root} holds no preparation, finished or not. name the --output_dir of a "
            "`gristmill prepare` command."
        )
    return found


def _is_one(place: Storage) -> bool:
    return any(place.exists(name) for name in (_JOB, manifest.NAME, f"train/{manifest.NAME}"))


def _folders(out: Storage) -> list[str]:
    if out.is_local:
        return sorted(e.name for e in os.scandir(out.path)) if out.path.is_dir() else []
    return sorted({entry.name.split("/")[0] for entry in out.list()})

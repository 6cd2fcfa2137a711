"""What a preparation came to, in words for somebody who does it for the first time."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from gristmill.data.preparation.progress import duration
from gristmill.data.raw import layouts
from gristmill.data.storage import Storage
from gristmill.data.store.manifest import Manifest, Source


def text(
    out: Storage,
    made: Mapping[str, Manifest],
    seconds: float | None,
    *,
    is_whole: bool = True,
    following: bool = True,
) -> str:
    """Several lines: what there is now, what was left out and why, and what follows.

    `seconds` is how long it took, None where that is not known; `is_whole` says whether all of it
    was done in that time, so that there is a speed.
    """
    tokens = sum(m.totals.tokens for m in made.values())
    size = sum(m.totals.text_bytes or 0 for m in made.values())
    documents = sum(m.totals.documents for m in made.values())
    took = ""
    if seconds is not None:
        speed = f" ({size / 1e6 / max(seconds, 1e-9):,.1f} MB/s)" if is_whole else ""
        took = f", {duration(seconds)}{speed}"
    lines = [
        f"{out.root}: {count(documents, 'document')}, {size / 1e6:,.1f} MB of text, "
        f"{tokens:,} tokens ({size / max(1, tokens):.2f} bytes per token){took}"
    ]
    if len(made) > 1:
        lines += [
            f"  {name + ':':6} {m.totals.tokens:,} tokens in {out.at(name)}"
            for name, m in sorted(made.items())
        ]
    first = out.below("train") if "train" in made else out
    lines += _left_out(first, next(iter(made.values())))
    if following:
        path = shlex.quote(out.root)
        lines.append(f"Next: gristmill pretrain MODEL --data LitData --data.data_path {path}")
    return "\n".join(lines)


def next_of_sets(layout: str, root: str) -> str:
    """What follows where a corpus became a dataset of each of its sets: a run reads them mixed."""
    module, path = layouts.get(layout).module, shlex.quote(root)
    return f"Next: gristmill pretrain MODEL --data {module} --data.data_path {path}"


def _left_out(out: Storage, manifest: Manifest) -> list[str]:
    source = manifest.source
    if source is None:
        return []
    lines = []
    listed = out.at("rejects.jsonl")
    if source.rejects:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in source.rejects.items())
        total = sum(source.rejects.values())
        lines.append(
            f"  left out, unreadable: {count(total, 'document')} ({reasons}; listed in {listed})"
        )
    if source.quarantined:
        path, reason = source.quarantined[0]
        lines.append(
            f"  left out, damaged: {count(len(source.quarantined), 'input')} "
            f"(first {path}: {reason}; listed in {listed})"
        )
    if source.filtered:
        by = chosen_by(source)
        lines.append(f"  left out by {by}: {count(source.filtered, 'document')}")
    elif source.filters:
        lines.append(f"  left out by filters: nothing ({json.dumps(dict(source.filters))})")
    if source.empty_documents:
        lines.append(f"  left out, without text: {count(source.empty_documents, 'document')}")
    if source.fast_dev_run:
        lines.append(
            "  a small slice, to try the command (--fast_dev_run): prepare all of it into another "
            "--output_dir, or here with --overwrite"
        )
    return lines


def chosen_by(source: Source) -> str:
    """What left documents out that could be read: filters, the user's function, or both."""
    if not source.map:
        return "filters"
    return "filters or --map" if source.filters else "--map"


def count(number: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

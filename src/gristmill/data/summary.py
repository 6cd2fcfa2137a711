"""What a preparation came to, in words for somebody who does it for the first time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from gristmill.data.manifest import Manifest
from gristmill.data.progress import duration
from gristmill.data.storage import Storage


def text(
    out: Storage, made: Mapping[str, Manifest], seconds: float | None, *, following: bool = True
) -> str:
    """Several lines: what there is now, what was left out and why, and what follows.

    `seconds` is how long it took, None where that is not known.
    """
    tokens = sum(m.totals.tokens for m in made.values())
    size = sum(m.totals.text_bytes or 0 for m in made.values())
    documents = sum(m.totals.documents for m in made.values())
    took = ""
    if seconds is not None:
        took = f", {duration(seconds)} ({size / 1e6 / max(seconds, 1e-9):,.1f} MB/s)"
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
        lines.append(f"  left out by filters: {count(source.filtered, 'document')}")
    if source.empty_documents:
        lines.append(f"  left out, without text: {count(source.empty_documents, 'document')}")
    return lines


def count(number: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

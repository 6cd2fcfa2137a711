"""What a preparation came to, in words for somebody who does it for the first time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from gristmill.data.manifest import Manifest
from gristmill.data.progress import duration


def text(out: Path, made: Mapping[str, Manifest], seconds: float, *, following: bool = True) -> str:
    """Several lines: what there is now, what was left out and why, and what follows."""
    tokens = sum(m.totals.tokens for m in made.values())
    size = sum(m.totals.text_bytes or 0 for m in made.values())
    documents = sum(m.totals.documents for m in made.values())
    lines = [
        f"{out}: {_count(documents, 'document')}, {size / 1e6:,.1f} MB of text, {tokens:,} tokens "
        f"({size / max(1, tokens):.2f} bytes per token), {duration(seconds)} "
        f"({size / 1e6 / max(seconds, 1e-9):,.1f} MB/s)"
    ]
    if len(made) > 1:
        lines += [
            f"  {name + ':':6} {m.totals.tokens:,} tokens in {out / name}"
            for name, m in sorted(made.items())
        ]
    lines += _left_out(out / ("train" if "train" in made else ""), next(iter(made.values())))
    if following:
        path = shlex.quote(str(out))
        lines.append(f"Next: gristmill pretrain MODEL --data LitData --data.data_path {path}")
    return "\n".join(lines)


def _left_out(out: Path, manifest: Manifest) -> list[str]:
    source = manifest.source
    if source is None:
        return []
    lines = []
    if source.rejects:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in source.rejects.items())
        total = sum(source.rejects.values())
        lines.append(
            f"  left out, unreadable: {_count(total, 'document')} "
            f"({reasons}; listed in {out / 'rejects.jsonl'})"
        )
    if source.empty_documents:
        lines.append(f"  left out, without text: {_count(source.empty_documents, 'document')}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

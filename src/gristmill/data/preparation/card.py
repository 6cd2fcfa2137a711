"""The card of a dataset: a `README.md` beside the chunks, for whoever finds it later."""

from __future__ import annotations

import json
from collections.abc import Iterable

from gristmill.data.preparation.summary import chosen_by, count
from gristmill.data.store.manifest import Manifest, Source

NAME = "README.md"

# Inputs beyond this many are counted, not listed: the manifest has them all.
_LISTED = 20


def text(manifest: Manifest) -> str:
    """The card in Markdown: counts, tokenizer, options, inputs, what was left out, how to read it.

    It says only what the manifest says, so that equal datasets have equal cards.
    """
    source = manifest.source
    title = "Tokens" if source is None else f"Tokens of {source.layout}"
    if source is not None and source.split:
        title += f", {source.split}"
    sections = [
        # Hugging Face's hub reads this block; nobody but its owner knows the licence.
        "---\nlicense: unknown\n---",
        f"# {title}",
        "Licence: unknown. Fill in that of the text, here and above.",
        _table(_counts(manifest)),
        "## Tokenizer",
        _tokenizer(manifest),
    ]
    if source is not None:
        sections += ["## Preparation", _table(_options(source))]
        sections += ["## Inputs", _inputs(source)]
        sections += ["## Left out", _left_out(source)]
    sections += ["## Reading it", _reading()]
    return "\n\n".join(sections) + "\n"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _counts(manifest: Manifest) -> list[tuple[str, str]]:
    totals = manifest.totals
    rows = [
        ("tokens", f"{totals.tokens:,}"),
        ("documents", f"{totals.documents:,}"),
        ("chunks", f"{totals.chunks:,}"),
    ]
    if totals.text_bytes is not None:
        rows += [
            ("text", f"{totals.text_bytes:,} bytes"),
            ("bytes per token", f"{totals.text_bytes / max(1, totals.tokens):.3f}"),
        ]
    return [*rows, ("element type", manifest.dtype), ("dataset id", f"`{manifest.dataset_id}`")]


def _tokenizer(manifest: Manifest) -> str:
    made = manifest.tokenizer
    if made is None:
        return "Unknown: the tokens were imported."
    frames = {
        (True, True): f"id {made.bos_id} before and id {made.eos_id} after each document",
        (True, False): f"id {made.bos_id} before each document",
        (False, True): f"id {made.eos_id} after each document",
        (False, False): "nothing around documents",
    }
    frame = frames[made.bos_id is not None, made.eos_id is not None]
    rows = [
        ("digest", f"SHA-256 `{made.digest}`, files in `tokenizer/`"),
        ("put around documents", frame if manifest.source else ""),
        ("special tokens in the text", "ordinary text" if manifest.source else ""),
        ("encoded by", made.engine),
        ("checked", made.parity),
    ]
    if manifest.num_token_ids is not None:
        rows.insert(1, ("ids", f"0 to {manifest.num_token_ids - 1:,}"))
    return _table([(name, value) for name, value in rows if value])


def _options(source: Source) -> list[tuple[str, str]]:
    rows = [
        ("layout", source.layout),
        ("text field", source.text_field if source.text_field != "text" else ""),
        ("separator", repr(source.separator) if source.separator else ""),
        ("filters", json.dumps(source.filters, sort_keys=True) if source.filters else ""),
        ("map", source.map or ""),
        ("seed", str(source.seed)),
        ("tokens per chunk", f"{source.chunk_tokens:,}"),
        ("held out for validation", f"{source.val_fraction:g}" if source.val_fraction else ""),
        ("validation files", source.val_pattern or ""),
        ("taken", "about 1 MB, to try things (fast_dev_run)" if source.fast_dev_run else ""),
        ("plan", f"`{source.plan}`"),
    ]
    return [(name, value) for name, value in rows if value]


def _inputs(source: Source) -> str:
    size = sum(size for _, size in source.inputs)
    lines = [f"{count(len(source.inputs), 'file')}, {size:,} bytes.", ""]
    lines += [f"- `{path}` ({size:,} bytes)" for path, size in source.inputs[:_LISTED]]
    if len(source.inputs) > _LISTED:
        lines.append(f"- … and {len(source.inputs) - _LISTED:,} more, listed in `manifest.json`")
    return "\n".join(lines)


def _left_out(source: Source) -> str:
    lines = [
        f"- {count(number, 'document')}: {reason}" for reason, number in source.rejects.items()
    ]
    if source.empty_documents:
        lines.append(f"- {count(source.empty_documents, 'document')} without text")
    if source.filtered:
        lines.append(f"- {count(source.filtered, 'document')} by {chosen_by(source)}")
    lines += [f"- `{path}`: {reason}" for path, reason in source.quarantined[:_LISTED]]
    if len(source.quarantined) > _LISTED:
        lines.append(f"- … and {len(source.quarantined) - _LISTED:,} more damaged inputs")
    counted = "Counted over the whole job, train and val together.\n\n" if source.split else ""
    return counted + "\n".join(lines) if lines else "Nothing."


def _reading() -> str:
    return """With gristmill:

    gristmill pretrain MODEL --data LitData --data.data_path THIS_FOLDER
    gristmill data inspect THIS_FOLDER --document 0

With litdata, as samples of 2048 tokens and their targets:

    from litdata import StreamingDataset, TokensLoader

    dataset = StreamingDataset("THIS_FOLDER", item_loader=TokensLoader(block_size=2049))

Documents may be parted at the end of a chunk; `chunks.npy` says where (`continues`)."""

"""The command `gristmill tokenizer train`: raw text in, a tokenizer's directory out."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from gristmill.config.commands import TokenizerTrain
from gristmill.data.preparation.summary import count
from gristmill.data.raw import layouts, sources
from gristmill.data.raw.documents import Format, Input, Reject
from gristmill.data.raw.inputs import list_inputs, root_of
from gristmill.data.raw.readers.compressed import is_compressed
from gristmill.data.raw.select import Selection
from gristmill.tokenizer.train import Trained, already_there, special_tokens, train_bpe
from gristmill.util.errors import UserError


def main(cfg: TokenizerTrain) -> None:
    """Train a tokenizer as `cfg` says, and print what was read, what came out, and what is next.

    Raises UserError for missing or unreadable input, an impossible vocabulary, and an out_dir that
    holds another tokenizer.
    """
    started = time.monotonic()
    if not cfg.input_dir:
        raise UserError("no text to train on. add --input_dir FOLDER (or a file).")
    # The quick refusals come before the text is read.
    special_tokens(cfg)
    already_there(cfg)
    text = _Text.find(cfg)
    trained = train_bpe(text, cfg, share=_share(text, cfg.max_bytes))
    _report(cfg, text, trained, time.monotonic() - started)


@dataclass
class _Text:
    """The documents of the input; can be read again. Rejects are those of the last reading."""

    path: str
    form: Format
    inputs: list[Input]
    selection: Selection | None
    rejects: list[Reject] = field(default_factory=list)

    @classmethod
    def find(cls, cfg: TokenizerTrain) -> _Text:
        path = cfg.input_dir or ""
        layout = layouts.get(cfg.layout)
        inputs = list_inputs(path, cfg.pattern or layout.pattern)
        form = Format(layout.records, cfg.text_field or layout.text_field)
        # A vocabulary is made from what will be encoded with it.
        selection = Selection.from_settings(dict(layout.filters)) if layout.filters else None
        return cls(path, form, inputs, selection)

    def __iter__(self) -> Iterator[str]:
        self.rejects = []
        some = False
        root = root_of(self.path)
        for document in sources.documents(
            self.form, root, self.inputs, self.rejects.append, selection=self.selection
        ):
            some = some or bool(document)
            yield document
        if not some:
            raise UserError(sources.nothing_read(self.path, len(self.inputs), self.rejects))


def _share(text: _Text, max_bytes: int) -> float:
    """The share of the text that `max_bytes` allows."""
    if max_bytes < 1:
        raise UserError(f"max_bytes {max_bytes} leaves no text. use --max_bytes 1_000_000_000.")
    is_plain = not any(_is_packed(item.place) for item in text.inputs)
    # The files on disk hold at least the bytes of their text, unless they are compressed.
    if is_plain and sum(item.size for item in text.inputs) <= max_bytes:
        return 1.0
    num_bytes = sum(len(document.encode("utf-8", "replace")) for document in text)
    return min(1.0, max_bytes / max(num_bytes, 1))


def _is_packed(place: str) -> bool:
    """Whether a file may hold more bytes of text than it has itself."""
    return is_compressed(place) or PurePath(place.lower()).suffix in (".parquet", ".arrow")


def _report(cfg: TokenizerTrain, text: _Text, trained: Trained, seconds: float) -> None:
    out_dir, vocab = cfg.out_dir, f"{trained.vocab_size:,}"
    lines = [f"Read {trained.num_bytes:,} bytes of text from {count(len(text.inputs), 'file')}."]
    if text.rejects:
        reasons = Counter(reject.reason for reject in text.rejects).most_common()
        counts = ", ".join(f"{number:,} {reason}" for reason, number in reasons)
        lines.append(f"Left out {count(len(text.rejects), 'document')}: {counts}.")
    if not trained.is_new:
        lines.append(f"Already done: {out_dir} holds this tokenizer ({vocab} tokens).")
    else:
        lines.append(
            f"Trained {vocab} tokens in {seconds:.1f} s; the text has "
            f"{trained.bytes_per_token:.2f} bytes per token. Written to {out_dir}."
        )
        if trained.vocab_size < cfg.vocab_size:
            lines.append(
                f"The text is too small for {cfg.vocab_size:,} tokens; it has no more pairs."
            )
    command = ["gristmill", "prepare", cfg.layout, "--input_dir", str(cfg.input_dir)]
    if cfg.pattern:
        command += ["--pattern", cfg.pattern]
    if cfg.text_field is not None:
        command += ["--text_field", cfg.text_field]
    command += ["--tokenizer_dir", str(out_dir), "--output_dir", "DATASET"]
    lines.append(f"Next: {shlex.join(command)} --val_fraction 0.01")
    sys.stdout.write("\n".join(lines) + "\n")

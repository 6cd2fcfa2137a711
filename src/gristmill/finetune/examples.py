"""Conversations as token ids, and which of them are learned."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.finetune.records import Conversation
from gristmill.tokenizer.chat import encode_chat
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError
from gristmill.util.paths import user_cache_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
"""Of the way from conversations to ids; part of what an encoded set is known by."""
DAY = (2024, 7, 26)
"""Now, to templates that write the date: a run that goes on another day must see the same records,
and so must the cache. It is the day that Llama's templates write where there is no clock."""
MANY = 10_000
"""Records whose encoding takes so long that it is said."""
WORTH_KEEPING_S = 2.0
"""Encodings that took longer are kept for the next start, and for the other processes."""
KEPT_BYTES = 1_000_000_000
"""Of all that is kept; what was used longest ago goes first."""


@dataclass(frozen=True)
class Examples:
    """Encoded conversations, one after another."""

    tokens: NDArray[np.int32]
    """Token ids, int32 [tokens]."""
    learned: NDArray[np.bool_]
    """Which tokens the model learns to write, bool [tokens]."""
    starts: NDArray[np.int64]
    """Where each conversation begins, and the end of the last, int64 [conversations + 1]."""
    digest: str
    """What tells this set apart from others: of records, template and tokenizer."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each conversation, int64 [conversations]."""
        return np.diff(self.starts)

    def cut(self, width: int) -> Examples:
        """The same with at most `width` tokens each, without those in which nothing is left to
        learn: the first token is nobody's target."""
        kept_tokens, kept_learned, starts = [], [], [0]
        for start, stop in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            stop = min(stop, start + width)
            if self.learned[start + 1 : stop].any():
                kept_tokens.append(self.tokens[start:stop])
                kept_learned.append(self.learned[start:stop])
                starts.append(starts[-1] + stop - start)
        return Examples(
            np.concatenate([np.empty(0, np.int32), *kept_tokens]),
            np.concatenate([np.empty(0, np.bool_), *kept_learned]),
            np.array(starts, dtype=np.int64),
            self.digest,
        )


def encode(talks: Sequence[Conversation], tokenizer: Tokenizer, *, mask_prompt: bool) -> Examples:
    """The conversations as `tokenizer.chat_template` writes them.

    With `mask_prompt` only what the assistant says is learned, and the marks that end it. What took
    long is kept in the user's cache.
    """
    digest = _digest(talks, tokenizer, mask_prompt)
    file = user_cache_dir() / "finetune" / f"{digest}.npz"
    kept = _read(file, digest)
    if kept is not None:
        return kept
    if len(talks) > MANY:
        sys.stderr.write(f"encoding {len(talks):,} records, once; kept in {file.parent}\n")
    started = time.monotonic()
    # Arrays at once: a list's numbers take ten times the memory.
    tokens, learned = [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
    for talk in talks:
        ids, mask = _encoded(talk, tokenizer, mask_prompt)
        tokens.append(np.array(ids, dtype=np.int32))
        learned.append(np.array(mask, dtype=np.bool_))
    starts = np.cumsum([len(ids) for ids in tokens], dtype=np.int64)
    examples = Examples(np.concatenate(tokens), np.concatenate(learned), starts, digest)
    if time.monotonic() - started > WORTH_KEEPING_S:
        _write(file, examples)
    return examples


def _encoded(
    talk: Conversation, tokenizer: Tokenizer, mask_prompt: bool
) -> tuple[list[int], list[bool]]:
    """As `encode_one`; what a template objects to is said with the record."""
    try:
        return encode_one(talk, tokenizer, mask_prompt=mask_prompt)
    except UserError as error:
        said = " ".join(str(talk.messages[0]["content"]).split())[:60]
        roles = ", ".join(str(message["role"]) for message in talk.messages[:6])
        raise UserError(f"{error} The record begins with {said!r} ({roles}).") from None


def encode_one(
    talk: Conversation, tokenizer: Tokenizer, *, mask_prompt: bool
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which are learned.

    An answer is what the conversation has beyond what the model is given to continue: the ids up to
    it, as chatting with the model makes them, end where the two begin to differ.
    """
    messages = talk.messages
    more: dict[str, Any] = on_the_day()
    if talk.tools:
        more["tools"] = talk.tools
    whole = encode_chat(tokenizer, messages, add_generation_prompt=False, **more)
    if not mask_prompt:
        return whole, [True] * len(whole)
    learned = [False] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        before = encode_chat(tokenizer, messages[:number], add_generation_prompt=True, **more)
        start, stop = _shared(whole, before), len(whole)
        if number + 1 < len(messages):
            so_far = messages[: number + 1]
            after = encode_chat(tokenizer, so_far, add_generation_prompt=False, **more)
            stop = _shared(whole, after)
            if stop <= start:  # the template writes earlier answers otherwise than the last one
                stop = _next_special(whole, start, tokenizer)
        learned[start:stop] = [True] * (stop - start)
    return whole, learned


def on_the_day() -> dict[str, Any]:
    """The clock of templates, for everything that a run encodes."""
    return {"strftime_now": datetime(*DAY).strftime}


def _shared(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


def _next_special(ids: list[int], start: int, tokenizer: Tokenizer) -> int:
    """Behind the first control token at or after `start`: no message can have written one."""
    special = {tokenizer.backend.special[text] for text in tokenizer.special_tokens}
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in special), len(ids))


def _digest(talks: Sequence[Conversation], tokenizer: Tokenizer, mask_prompt: bool) -> str:
    digest = hashlib.sha256()
    words = [VERSION, tokenizer.digest, tokenizer.chat_template, mask_prompt]
    if "strftime_now" in (tokenizer.chat_template or ""):
        words.append(datetime(*DAY).isoformat())
    digest.update(json.dumps(words).encode())
    for talk in talks:
        content = json.dumps([talk.messages, talk.tools], sort_keys=True, default=str)
        digest.update(content.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _read(file: Path, digest: str) -> Examples | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            examples = Examples(kept["tokens"], kept["learned"], kept["starts"], digest)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # when it was used last
    return examples


def _write(file: Path, examples: Examples) -> None:
    with contextlib.suppress(OSError):  # it is only for speed
        file.parent.mkdir(parents=True, exist_ok=True)
        # Readable by nobody else, as the records may be.
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(
                    stream,
                    tokens=examples.tokens,
                    learned=examples.learned,
                    starts=examples.starts,
                )
            os.replace(partial, file)
        finally:
            Path(partial).unlink(missing_ok=True)
        _make_room(file.parent)


def _make_room(folder: Path) -> None:
    """Remove what was used longest ago, the newest file never: others may be at work here too."""
    seen = [(file.stat(), file) for file in folder.iterdir()]
    newest_first = sorted(seen, key=lambda pair: -pair[0].st_mtime_ns)
    total = newest_first[0][0].st_size
    for status, file in newest_first[1:]:
        total += status.st_size
        if total > KEPT_BYTES:
            file.unlink(missing_ok=True)


def check_ids(examples: Examples, rows: int, tokenizer: Tokenizer) -> None:
    """Raise UserError where the model has no row for an id."""
    largest = int(examples.tokens.max(initial=-1))
    if largest >= rows:
        raise UserError(
            f"the tokenizer in {tokenizer.path.parent} does not belong to this model: a record has "
            f"the token id {largest:,}, and the model has {rows:,} rows. Name the tokenizer that "
            "the model was trained with by --tokenizer_dir."
        )

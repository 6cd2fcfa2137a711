"""The engine that encodes documents: the tokenizer's definition, or a faster one that equals it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import xxhash

from gristmill.tokenizer import parity
from gristmill.tokenizer.long_text import Cutter, Encoded, encode_bounded, without_surrogates
from gristmill.tokenizer.parity import EncodesBatch, Verdict
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError
from gristmill.util.extras import install_command

Requested = Literal["auto", "tokenizers", "fastokens"]

FASTOKENS = "fastokens"
_RECHECK_ONE_IN = 10_000


@dataclass(frozen=True)
class EngineChoice:
    """An engine for a job. `parity`: it is the definition, or it passed the comparison with it.

    `note` says in words why a faster engine was not taken; it is for people, not for manifests.
    """

    name: str
    version: str
    parity: Literal["definition", "passed"]
    note: str = ""


def single_thread_env() -> dict[str, str]:
    """Environment of a process that encodes on one thread; set it before `tokenizers` is imported.

    Preparation runs one process per core. Both libraries otherwise take all cores in each, and
    `fastokens` one thread more that helps with large texts and takes turns with its caller.
    """
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "FASTOKENS_BPE_THREADS": "1",
    }


def choose_engine(
    tokenizer: Tokenizer, requested: Requested, sample_texts: Iterable[str]
) -> EngineChoice:
    """The engine for a job: with `auto` the fastest that encodes exactly as the definition.

    `sample_texts` are the job's own documents, of which up to 1 MB are compared. Raises UserError
    when the requested engine is not there, cannot read the tokenizer, or encodes differently.
    """
    definition = EngineChoice(tokenizer.kind, _version(tokenizer.kind) or "?", "definition")
    if requested == "tokenizers":
        return definition
    reason = _why_not_fastokens(tokenizer, definition, sample_texts)
    if reason and requested == FASTOKENS:
        raise UserError(f"the engine fastokens cannot be used: {reason}.")
    if reason:
        note = f"the faster {FASTOKENS} is not used: {reason}"
        return EngineChoice(definition.name, definition.version, "definition", note)
    return EngineChoice(FASTOKENS, _version(FASTOKENS) or "?", "passed")


class Encoder(EncodesBatch, Protocol):
    """What encodes the documents of a job."""

    @property
    def cutter(self) -> Cutter:
        """Where long texts may be cut without changing their ids."""


def open_engine(tokenizer: Tokenizer, choice: EngineChoice) -> Encoder:
    """An object whose `encode_batch(texts)` gives (ids uint32[N], offsets int64[n + 1]).

    Raises UserError when the chosen engine is not the one on this machine, and, from
    `encode_batch`, RunError when a re-checked document differs from the definition.
    """
    if choice.parity == "definition":
        return tokenizer
    here = _version(choice.name)
    if here != choice.version:
        found = f"version {here}" if here else "none"
        raise UserError(
            f"the job was planned with {choice.name} {choice.version}, this machine has {found}. "
            f"install it with `pip install {choice.name}=={choice.version}`, "
            "or use --engine tokenizers."
        )
    return _Rechecked(tokenizer, _Fastokens(tokenizer), choice.version)


class _Fastokens:
    """Texts to ids by `fastokens`; the only place that imports it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as Library

        self._library = Library.from_file(str(tokenizer.path))
        self._library.no_truncation()
        self._library.no_padding()
        self.cutter = tokenizer.cutter

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        return encode_bounded(texts, self._encode_call, self.cutter)

    def _encode_call(self, texts: list[str]) -> Encoded:
        try:
            ids, offsets = self._library.encode_batch_flat(texts, split_special_tokens=True)
        except UnicodeEncodeError:
            texts = [without_surrogates(text) for text in texts]
            ids, offsets = self._library.encode_batch_flat(texts, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)


class _Rechecked:
    """An engine of which one document in 10,000, chosen by content, is compared while running.

    The choice takes one hash for a batch: of n documents, one with a probability of n in 10,000.
    """

    def __init__(self, tokenizer: Tokenizer, engine: EncodesBatch, version: str) -> None:
        self.cutter = tokenizer.cutter
        self._tokenizer = tokenizer
        self._engine = engine
        self._version = version

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        ids, offsets = self._engine.encode_batch(texts)
        for index in _rechecked(texts):
            expected, _ = self._tokenizer.encode_batch([texts[index]])
            if not np.array_equal(expected, ids[offsets[index] : offsets[index + 1]]):
                self._fail(texts[index])
        return ids, offsets

    def _fail(self, text: str) -> None:
        where = parity.difference(self._tokenizer, self._engine, [text])
        definition = EngineChoice(self._tokenizer.kind, _version("tokenizers") or "?", "definition")
        verdict = Verdict(_identity(definition), reason=where or "not repeatable")
        parity.remember(_verdict_path(self._tokenizer), verdict)
        raise RunError(
            f"fastokens {self._version} encodes a document differently from the tokenizer's "
            f"definition ({where}). run the command again with --engine tokenizers."
        )


def _rechecked(texts: Sequence[str]) -> Sequence[int]:
    """The documents of a batch that are compared: one or none."""
    if not texts:
        return ()
    head = f"{len(texts)} {len(texts[-1])} {texts[0][:256]}".encode("utf-8", "replace")
    hashed = xxhash.xxh3_64_intdigest(head)
    chosen = hashed % _RECHECK_ONE_IN < len(texts)
    return (hashed // _RECHECK_ONE_IN % len(texts),) if chosen else ()


def _why_not_fastokens(
    tokenizer: Tokenizer, definition: EngineChoice, sample_texts: Iterable[str]
) -> str:
    """Why the engine cannot encode for this tokenizer; empty when it can."""
    version = _version(FASTOKENS)
    if tokenizer.kind != "tokenizers":
        return "it reads tokenizer.json only, and this tokenizer is a SentencePiece model"
    if version is None:
        install = install_command("fast")
        return f"it is not installed. install it with `{install}`, or use --engine tokenizers"
    try:
        engine = _Fastokens(tokenizer)
    except Exception as error:  # the library raises whatever it meets
        return f"it cannot read {tokenizer.path} ({error}). use --engine tokenizers"
    verdict = parity.examine(
        tokenizer,
        engine,
        name=_identity(definition),
        special_tokens=tokenizer.special_tokens,
        sample_texts=sample_texts,
        path=_verdict_path(tokenizer),
    )
    if verdict.reason:
        return f"version {version} encodes differently ({verdict.reason}). use --engine tokenizers"
    return ""


def _verdict_path(tokenizer: Tokenizer) -> Path:
    return parity.verdict_path(tokenizer.digest, FASTOKENS, _version(FASTOKENS) or "?")


def _identity(definition: EngineChoice) -> str:
    return f"{definition.name} {definition.version}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

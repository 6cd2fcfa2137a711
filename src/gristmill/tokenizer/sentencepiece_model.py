"""A SentencePiece `tokenizer.model`; the only file that imports `sentencepiece`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from gristmill.tokenizer.long_text import (
    Cutter,
    Encoded,
    Mark,
    encode_bounded,
    flat,
    marks_within,
    without_surrogates,
)
from gristmill.tokenizer.sentencepiece_proto import BPE, model_type
from gristmill.tokenizer.sidecar import AddedToken
from gristmill.util.errors import MissingPackage, UserError
from gristmill.util.extras import install_command


class SentencePieceBackend:
    """Text to ids and back as the model at `path` defines it, with tokens added beside it."""

    kind = "sentencepiece"

    def __init__(self, path: Path, added: Sequence[AddedToken]) -> None:
        self._model = _load(path)
        size: int = self._model.vocab_size()
        # Tokens that only the files beside the model know. Those inside its range are its own.
        extra = {token.content: token for token in added if token.id >= size}
        self._text_of = {token.id: token.content for token in extra.values()}
        self.num_token_ids = max(self._text_of, default=size - 1) + 1
        self.bos_id = _id_or_none(self._model.bos_id())
        self.eos_id = _id_or_none(self._model.eos_id())
        control = (i for i in range(size) if self._model.is_control(i))
        self.special = {self._model.id_to_piece(i): i for i in control}
        self.special |= {token.content: token.id for token in extra.values() if token.special}
        self._text_of |= {token_id: text for text, token_id in self.special.items()}
        self._always = {t.content: t.id for t in extra.values() if not t.special}
        self._split_always = _splitter(self._always)
        self._split_special = _splitter(self._always | self.special)
        self.cutter = Cutter(self._encode, self._parts_at)

    def token_id(self, token: str) -> int | None:
        """The id of the token with this exact text."""
        for table in (self.special, self._always):
            if token in table:
                return table[token]
        token_id: int = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def token_text(self, token_id: int) -> str | None:
        """The text that names the token with this id."""
        if token_id in self._text_of:
            return self._text_of[token_id]
        known = 0 <= token_id < self._model.vocab_size()
        return self._model.id_to_piece(token_id) if known else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`; with `special`, control tokens written in it become their ids."""
        return self._encode(text, special=special)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """(ids uint32[N], offsets int64[len(texts) + 1]) of all texts, control ones as text."""
        return encode_bounded(texts, self._encode_call, self.cutter)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of `ids`; ids without a token have none."""
        return "".join(self._texts(ids, skip_special))

    def prompt_starts_with(self, token: int | None) -> bool:
        """Whether a text starts with `token` where no file says so: the BOS of every such model."""
        return token is not None

    def _parts_at(self) -> set[Mark]:
        """The marks that no token reaches over; see `Cutter`."""
        # Added tokens begin the text anew, with the model's own space. Only merges are local: a
        # unigram model weighs the text as a whole.
        if self._always or model_type(self._model.serialized_model_proto()) != BPE:
            return set()
        reached = marks_within(
            [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        )
        marks: set[Mark] = {"\n", " "}
        # The model's normalizer may make a newline a space.
        return set() if " " in reached else marks - reached

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        table, split = self._always, self._split_always
        if special:
            table, split = self._always | self.special, self._split_special
        ids: list[int] = []
        for part in split.split(text) if split else [text]:
            ids += [table[part]] if part in table else self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._model.encode(text)
        except (RuntimeError, UnicodeError):
            ids = self._model.encode(without_surrogates(text))
        return ids

    def _encode_call(self, texts: list[str]) -> Encoded:
        return flat(map(self._encode, texts))

    def _texts(self, ids: Sequence[int], skip_special: bool) -> Iterator[str]:
        size = self._model.vocab_size()
        if skip_special:
            hidden = set(self.special.values())
            ids = [i for i in ids if i not in hidden]
        for apart, group in groupby(ids, key=lambda i: i in self._text_of or not 0 <= i < size):
            if apart:
                yield "".join(self._text_of.get(i, "") for i in group)
            else:
                yield self._model.decode(list(group))


def _load(path: Path):  # type: ignore[no-untyped-def]  # the package has no types
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingPackage(
            f"{path} needs the package sentencepiece, which is not installed. "
            f"install it with `{install_command('sentencepiece')}`."
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a SentencePiece model ({error}). "
            "use a directory with tokenizer.json, or download the tokenizer again."
        ) from error


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _splitter(tokens: dict[str, int]) -> re.Pattern[str] | None:
    """Parts a text at the given tokens, keeping them; the longest wins."""
    if not tokens:
        return None
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

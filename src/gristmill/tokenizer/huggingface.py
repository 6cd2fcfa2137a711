"""A `tokenizer.json`, encoded and decoded by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from gristmill.tokenizer.long_text import (
    Cutter,
    Encoded,
    Mark,
    encode_bounded,
    flat,
    marks_within,
    without_surrogates,
)
from gristmill.util.errors import UserError


class HuggingFaceBackend:
    """Text to ids and back as the file at `path` defines it, adding no token of its own accord.

    Whether special tokens are read in a text is a setting of a library object, and threads share
    those: there is one for each setting, and neither is changed once it encodes. Otherwise what
    one user types could become a control token while another thread encodes a template.
    """

    kind = "tokenizers"

    def __init__(self, path: Path) -> None:
        try:
            self.library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"cannot read {path} ({error}). download the tokenizer again, or make one "
                "with `gristmill tokenizer train`."
            ) from error
        # Files made for models often carry these; here they would cut documents or pad them.
        self.library.no_truncation()
        self.library.no_padding()
        if getattr(self.library.model, "dropout", None):
            self.library.model.dropout = None
        self.library.encode_special_tokens = True
        self._reading: Library | None = None
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        self.num_token_ids = max(vocabulary.values(), default=-1) + 1
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        added = self.library.get_added_tokens_decoder()
        self.special = {t.content: i for i, t in added.items() if t.special}
        self.cutter = Cutter(self._encode, self._parts_at)

    def token_id(self, token: str) -> int | None:
        """The id of the token with this exact text."""
        found: int | None = self.library.token_to_id(token)
        return found

    def token_text(self, token_id: int) -> str | None:
        """The text that names the token with this id."""
        found: str | None = self.library.id_to_token(token_id)
        return found

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`; with `special`, special tokens written in it become their ids."""
        return self._encode(text, self._reading_special() if special else None)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """(ids uint32[N], offsets int64[len(texts) + 1]) of all texts, special ones as text."""
        return encode_bounded(texts, self._encode_call, self.cutter)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of `ids`; ids without a token have none."""
        text: str = self.library.decode(ids, skip_special_tokens=skip_special)
        return text

    def prompt_starts_with(self, token: int | None) -> bool:
        """Whether the file's own post-processor puts `token` before a text."""
        encoded = self.library.encode("a", add_special_tokens=True).ids
        return token is not None and encoded[:1] == [token] != self._encode("a")[:1]

    def _parts_at(self) -> set[Mark]:
        """The marks that no token reaches over; see `Cutter`."""
        added = self.library.get_added_tokens_decoder().values()
        if any((token.lstrip or token.rstrip) and not token.special for token in added):
            return set()
        reached = marks_within(self.library.get_vocab(with_added_tokens=True))
        if self.library.normalizer is not None and " " in reached:
            return set()  # it may make a newline a space
        marks: set[Mark] = {"\n", " "}
        return {mark for mark in marks - reached if self._starts_anew(mark)}

    def _starts_anew(self, mark: Mark) -> bool:
        """Whether tokens on one side of the mark do not depend on what is on the other."""
        before = self.library.pre_tokenizer
        if before is not None and len(before.pre_tokenize_str(f"a{mark}a")) > 1:
            return True
        model = self.library.model
        # Merges only join neighbours into tokens; other models weigh the text as a whole.
        return isinstance(model, BPE) and not model.ignore_merges

    def _reading_special(self) -> Library:
        """The library object that reads special tokens; few processes need one."""
        if self._reading is None:
            # Two threads may both make one; each is whole before anybody sees it.
            made = Library.from_str(self.library.to_str())
            made.encode_special_tokens = False
            self._reading = made
        return self._reading

    def __getstate__(self) -> dict[str, Any]:
        """All but what is made again where it is needed."""
        return {**self.__dict__, "_reading": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The same again, with the setting that the library forgets when it is pickled."""
        self.__dict__.update(state)
        self.library.encode_special_tokens = True

    def _encode(self, text: str, library: Library | None = None) -> list[int]:
        library = library or self.library
        try:
            ids: list[int] = library.encode(text, add_special_tokens=False).ids
        except TypeError:
            ids = library.encode(without_surrogates(text), add_special_tokens=False).ids
        return ids

    def _encode_call(self, texts: list[str]) -> Encoded:
        try:
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            texts = [without_surrogates(text) for text in texts]
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return flat(encoding.ids for encoding in encodings)

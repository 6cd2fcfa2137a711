"""A `tokenizer.json`, encoded and decoded by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Library

from gristmill.tokenizer.long_text import (
    Encoded,
    LongText,
    encode_bounded,
    flat,
    without_surrogates,
)
from gristmill.util.errors import UserError

# Byte-level tokenizers write the bytes that are no visible character of Latin-1 as U+0100 and on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SHIFTED = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(_SHIFTED)}


class HuggingFaceBackend:
    """Text to ids and back as the file at `path` defines it, adding no token of its own accord."""

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
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        self.num_token_ids = max(vocabulary.values(), default=-1) + 1
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        added = self.library.get_added_tokens_decoder()
        self.special = {t.content: i for i, t in added.items() if t.special}
        self.long_text = LongText(self._encode, self._spans_line)

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
        self.library.encode_special_tokens = not special
        try:
            return self._encode(text)
        finally:
            self.library.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """(ids uint32[N], offsets int64[len(texts) + 1]) of all texts, special ones as text."""
        return encode_bounded(texts, self._encode_call, self.long_text)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of `ids`; ids without a token have none."""
        text: str = self.library.decode(ids, skip_special_tokens=skip_special)
        return text

    def prompt_starts_with(self, token: int | None) -> bool:
        """Whether the file's own post-processor puts `token` before a text."""
        encoded = self.library.encode("a", add_special_tokens=True).ids
        return token is not None and encoded[:1] == [token] != self._encode("a")[:1]

    def _spans_line(self) -> bool:
        added = self.library.get_added_tokens_decoder().values()
        return any(map(spans_line, self.library.get_vocab(with_added_tokens=True))) or any(
            token.lstrip and not token.special for token in added
        )

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        except TypeError:
            ids = self.library.encode(without_surrogates(text), add_special_tokens=False).ids
        return ids

    def _encode_call(self, texts: list[str]) -> Encoded:
        try:
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            texts = [without_surrogates(text) for text in texts]
            encodings = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return flat(encoding.ids for encoding in encodings)


def spans_line(token: str) -> bool:
    """Whether the text of a vocabulary entry has a newline followed by a letter.

    The entry is read as plain text and as the bytes it may stand for; a part of a character counts
    as a letter.
    """
    readings = [token]
    if "Ċ" in token and all(char in _BYTE_OF for char in token):
        readings.append(bytes(_BYTE_OF[char] for char in token).decode("utf-8", "replace"))
    following = (text[at + 1] for text in readings for at in _newlines(text[:-1]))
    return any(char.isalpha() or char == "\ufffd" for char in following)


def _newlines(text: str) -> list[int]:
    return [index for index, char in enumerate(text) if char == "\n"] if "\n" in text else []

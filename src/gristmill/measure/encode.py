"""Texts as lm-evaluation-harness hands them over, as token ids: cut exactly as its own models do.

Only then are results those that other tools measure: the space between question and answer belongs
to the answer, BOS comes where the tokenizer's files say, and special tokens in a text are control
ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from gristmill.measure.score import Query
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

REMEMBERED = 1 << 16
"""Texts whose ids are kept: the choices of a question have their context in common."""


class Encoder:
    """The ids of contexts and continuations by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._encode = lru_cache(REMEMBERED)(self._encode_now)

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has no context: BOS, or else EOS."""
        for token_id in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token_id is not None:
                return token_id
        raise UserError(
            f"the tokenizer in {self.tokenizer.path.parent} has neither a BOS nor an EOS token, "
            "and a text without context has to begin with one. name one as eos_token in its "
            "tokenizer_config.json."
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with BOS where the model was made with it and the text has none."""
        bos = self.tokenizer.bos_token
        written_out = bos is not None and text.startswith(bos)
        return list(self._encode(text, self.tokenizer.adds_bos and not written_out))

    def query(self, context: str, continuation: str) -> Query:
        """Both as ids. A context without text is `prefix_id`."""
        if not context:
            ids = list(self._encode(continuation, False))
            if ids and ids[0] == self.prefix_id:
                return Query(ids[:1], ids[1:])
            return Query([self.prefix_id], ids)
        # Tokens often begin with a space and rarely end with one.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole = self.encode(stripped + continuation)
        before = self.encode(stripped)
        if not before:  # a context of nothing but white space
            return Query([self.prefix_id], whole)
        return Query(before, whole[len(before) :])

    def windows(self, text: str, limit: int) -> Iterator[Query]:
        """A long text in pieces that the model's context of `limit` tokens has room for.

        Every token is asked for once; a piece behind the first has the tokens before it as its
        context, as many as fit.
        """
        ids = [self.prefix_id, *self.encode(text)]
        for start in range(1, len(ids), limit):
            end = min(start + limit, len(ids))
            first = max(0, end - limit - 1)
            yield Query(ids[first:start], ids[start:end])

    def _encode_now(self, text: str, bos: bool) -> Sequence[int]:
        return tuple(self.tokenizer.encode(text, bos=bos, special=True))

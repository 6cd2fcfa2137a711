"""One reply under way: what was asked for, what has been written of it, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gristmill.infer.stops import StopText
from gristmill.models.sampling import penalize
from gristmill.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one reply is to be: the ids that it follows and how its tokens are chosen.

    `max_new_tokens` fits into the room behind `ids`. `goes_on` tells a continuation of the text of
    `ids` from a text of its own (a chat's reply). `num_logprobs` None wants no log-probabilities,
    0 those of the chosen tokens, n also those of the n likeliest.
    """

    ids: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    seed: int = 0
    num_logprobs: int | None = None
    goes_on: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's text with its log-probability, and those of the likeliest in its place.

    They are the model's own: of its logits before temperature, penalties and filters. `offset` is
    where the token begins in the reply's text, in characters.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """Text that was added to a reply, by how many tokens, and at its end why: "stop" or "length".

    `tokens` are those whose text is out, if they were asked for.
    """

    text: str
    num_tokens: int
    tokens: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None


class Reply:
    """The state of one reply between two steps of the model.

    `last` is the token that it has got last, and `read_ids` those before, which the model has read.
    """

    def __init__(self, ask: Ask, tokenizer: Tokenizer, device: torch.device) -> None:
        self.ask = ask
        self.num_tokens = 0
        self.read_ids: list[int] = []
        self._num_told = 0
        self.last = -1
        self.generator = torch.Generator(device).manual_seed(ask.seed)
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder()
        if ask.goes_on:
            # The last few settle whether a leading space is one.
            for token_id in ask.ids[-8:]:
                self._decoder.put(token_id)
        self._stops = StopText(ask.stops)
        self._seen = dict.fromkeys(ask.ids)
        self._written: set[int] = set()
        self._added: Tensor | None = None
        self._num_chars = 0  # of all text, withheld text included
        self._num_shown = 0
        self._held: list[TokenLogprobs] = []

    @property
    def is_greedy(self) -> bool:
        """Whether its next token is the likeliest, whatever the random choices."""
        return self.ask.temperature == 0.0 or self.ask.top_k == 1 or self.ask.top_p <= 0.0

    def bend(self, logits: Tensor) -> Tensor:
        """Logits [1, V] after penalties and biases; the same tensor where there are none."""
        ask = self.ask
        if ask.repetition_penalty != 1.0:
            logits = penalize(logits, [list(self._seen)], ask.repetition_penalty)
        if self._adds:
            logits = logits + self._additions(logits).to(logits.dtype)
        return logits

    def put(self, token_id: int, logits: Tensor) -> Piece | None:
        """What the chosen token adds, None while there is nothing to say; `logits` are [1, V]."""
        if token_id in self.ask.stop_ids:
            return self._end("stop", self._shown(self._decoder.flush()))
        if self.num_tokens:
            self.read_ids.append(self.last)
        self.last = token_id
        self.num_tokens += 1
        self._count(token_id, logits)
        if self.ask.num_logprobs is not None:
            self._held.append(self._logprobs(token_id, logits))
        text = self._shown(self._decoder.put(token_id))
        if self._stops.stopped:
            return self._end("stop", text)
        if self.num_tokens == self.ask.max_new_tokens:
            return self._end("length", text + self._shown(self._decoder.flush()))
        return Piece(text, self._new(), self._ready()) if text else None

    @property
    def _adds(self) -> bool:
        ask = self.ask
        return bool(ask.logit_bias or ask.presence_penalty or ask.frequency_penalty)

    def _additions(self, logits: Tensor) -> Tensor:
        """What is added to each logit now: biases, less penalties; kept from token to token."""
        if self._added is None:
            self._added = torch.zeros(logits.shape, device=logits.device)
            for token_id, bias in self.ask.logit_bias.items():
                self._added[0, token_id] = bias
        return self._added

    def _count(self, token_id: int, logits: Tensor) -> None:
        """Let the penalties know of a token that was written."""
        if self._adds:
            is_new = token_id not in self._written
            less = self.ask.frequency_penalty + is_new * self.ask.presence_penalty
            self._additions(logits)[0, token_id] -= less
        self._written.add(token_id)
        self._seen[token_id] = None

    def _shown(self, text: str) -> str:
        """The part of new text that no stop withholds."""
        self._num_chars += len(text)
        shown = self._stops.put(text)
        self._num_shown += len(shown)
        return shown

    def _end(self, finish: str, text: str) -> Piece:
        """The last piece; a token whose text a stop took away is not reported."""
        rest = self._stops.flush()
        self._num_shown += len(rest)
        tokens = self._held
        if self._stops.stopped:
            finish = "stop"
            tokens = [token for token in tokens if token.offset < self._num_shown]
        self._held = []
        return Piece(text + rest, self._new(), tuple(tokens), finish)

    def _new(self) -> int:
        """Tokens since the last piece."""
        told, self._num_told = self._num_told, self.num_tokens
        return self.num_tokens - told

    def _ready(self) -> tuple[TokenLogprobs, ...]:
        """The tokens whose text is out."""
        ready = [token for token in self._held if token.offset < self._num_shown]
        self._held = self._held[len(ready) :]
        return tuple(ready)

    def _logprobs(self, token_id: int, logits: Tensor) -> TokenLogprobs:
        assert self.ask.num_logprobs is not None
        logprobs = logits[0].float().log_softmax(-1)
        top: tuple[tuple[str, float], ...] = ()
        if self.ask.num_logprobs:
            values, ids = logprobs.topk(min(self.ask.num_logprobs, len(logprobs)))
            top = tuple(
                (self._text_of(i), value)
                for i, value in zip(ids.tolist(), values.tolist(), strict=True)
            )
        return TokenLogprobs(
            self._text_of(token_id), float(logprobs[token_id]), top, self._num_chars
        )

    def _text_of(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)

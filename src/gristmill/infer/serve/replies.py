"""Replies in the API's words: one JSON object, or the events of a stream."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import orjson

from gristmill.infer.serve.fields import Refused
from gristmill.infer.serve.reply import Piece, TokenLogprobs
from gristmill.infer.serve.requests import Wanted

Json = dict[str, Any]

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(refused: Refused) -> Json:
    """The answer to a request that is not answered."""
    fault = "invalid_request_error" if refused.status < 500 else "server_error"
    return {
        "error": {
            "message": refused.message,
            "type": _TYPES.get(refused.status, fault),
            "param": refused.param,
            "code": refused.code,
        }
    }


def model_body(name: str, created: int, max_length: int) -> Json:
    """What /v1/models says of the model; `max_model_len` is other servers' word."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "gristmill",
        "max_model_len": max_length,
    }


@dataclass
class Answer:
    """What is said to one request: `whole` of the pieces that were added, or an `event` for each.

    Pieces come in their order.
    """

    wanted: Wanted
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0

    def __post_init__(self) -> None:
        """Make the id and room for the texts."""
        kind = "chatcmpl" if self.wanted.is_chat else "cmpl"
        self.id = self.id or f"{kind}-{secrets.token_hex(12)}"
        count = len(self.wanted.asks)
        self._texts = [[text] for text in self.wanted.echoes or [""] * count]
        self._tokens: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        self._finish: list[str | None] = [None] * count

    def add(self, number: int, piece: Piece) -> None:
        """Take in a piece of reply `number`."""
        self._texts[number].append(piece.text)
        self._tokens[number] += piece.tokens
        self._finish[number] = piece.finish
        self.num_tokens += piece.num_tokens

    def whole(self) -> Json:
        """The answer in one object, once all replies have ended."""
        choices = [
            self._choice(number, "".join(pieces), self._tokens[number], self._finish[number])
            for number, pieces in enumerate(self._texts)
        ]
        kind = "chat.completion" if self.wanted.is_chat else "text_completion"
        return {**self._frame(kind), "choices": choices, "usage": self._usage()}

    def beginning(self) -> list[bytes]:
        """The events of a stream before the model's first words."""
        count = len(self._texts)
        if self.wanted.is_chat:
            return [
                self._event([self._delta(n, {"role": "assistant", "content": ""}, (), None)])
                for n in range(count)
            ]
        if self.wanted.echoes is not None:
            return [
                self._event([self._choice(n, text, [], None)])
                for n, text in enumerate(self.wanted.echoes)
            ]
        return []

    def event(self, number: int, piece: Piece) -> bytes:
        """The event, or the two, for a piece of reply `number`, which is not kept."""
        self.num_tokens += piece.num_tokens
        if not self.wanted.is_chat:
            return self._event([self._choice(number, piece.text, list(piece.tokens), piece.finish)])
        events = []
        if piece.text or piece.tokens:
            delta = self._delta(number, {"content": piece.text}, piece.tokens, None)
            events.append(self._event([delta]))
        if piece.finish is not None:
            events.append(self._event([self._delta(number, {}, (), piece.finish)]))
        return b"".join(events)

    def end(self) -> bytes:
        """The events behind the last words."""
        usage = self._event([], usage=self._usage()) if self.wanted.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.wanted.is_chat else "text_completion"
        body = {**self._frame(kind), "choices": choices}
        if self.wanted.include_usage:
            body["usage"] = usage
        return as_event(body)

    def _frame(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> Json:
        prompt = self.wanted.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
        }

    def _choice(
        self, number: int, text: str, tokens: list[TokenLogprobs], finish: str | None
    ) -> Json:
        if self.wanted.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = self._chat_logprobs(number, tokens)
            return {
                "index": number,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": finish,
            }
        return {
            "index": number,
            "text": text,
            "logprobs": self._completion_logprobs(number, tokens),
            "finish_reason": finish,
        }

    def _delta(
        self, number: int, delta: Json, tokens: tuple[TokenLogprobs, ...], finish: str | None
    ) -> Json:
        logprobs = self._chat_logprobs(number, list(tokens)) if tokens else None
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _completion_logprobs(self, number: int, tokens: list[TokenLogprobs]) -> Json | None:
        wanted = self.wanted.asks[number].num_logprobs
        if wanted is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens] if wanted else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _chat_logprobs(self, number: int, tokens: list[TokenLogprobs]) -> Json | None:
        if self.wanted.asks[number].num_logprobs is None:
            return None
        return {
            "content": [
                {
                    **_scored(token.text, token.logprob),
                    "top_logprobs": [_scored(text, logprob) for text, logprob in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }


def as_event(body: Json) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _scored(text: str, logprob: float) -> Json:
    # A token that is a part of a character has no text of its own, and its bytes are not known.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

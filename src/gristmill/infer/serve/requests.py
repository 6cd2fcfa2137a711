"""What clients ask for, read from the API's JSON into what the engine is told.

Every setting is honoured, or refused in words; none is passed over. The API is OpenAI's
(https://platform.openai.com/docs/api-reference); `top_k`, `min_p`, `repetition_penalty` and
`ignore_eos` are spelled as other servers of open models spell them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gristmill.infer.serve.fields import Fields, Refused, is_number, is_whole
from gristmill.infer.serve.reply import Ask

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_LOGPROBS = 2**18
"""Numbers in one answer, some 100 bytes each."""

COMPLETION_TOKENS = 16
"""How long completions are that do not say, as in OpenAI's API."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a reply is like whose request does not say; `max_new_tokens` None: as OpenAI does."""

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may want: tokens of a sequence, ids there are, replies at a time."""

    max_length: int
    num_ids: int
    max_replies: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request that was understood: one `Ask` for each reply, and the form of the answer.

    `echoes` has the prompt's text for each reply where it is to be repeated.
    """

    asks: list[Ask]
    is_chat: bool
    stream: bool
    include_usage: bool
    num_prompt_tokens: int
    echoes: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns requests into what is wanted, for one model.

    `prompt_ids` encodes a text to continue, `chat_ids` a conversation (None: the model has no chat
    template, which otherwise `takes_system` prompts or not); both may raise UserError. `decode` is
    the text of ids.
    """

    model: str
    limits: Limits
    defaults: Defaults
    stop_ids: frozenset[int]
    chat_stop_ids: frozenset[int]
    prompt_ids: Callable[[str], list[int]]
    chat_ids: Callable[[list[dict[str, Any]]], list[int]] | None
    takes_system: bool
    decode: Callable[[list[int]], str]

    def completion(self, body: bytes) -> Wanted:
        """What a request to /v1/completions wants; raises Refused."""
        fields = self._fields(body)
        prompts = self._prompts(fields.take("prompt"))
        count = fields.whole("n", 1, low=1)
        if fields.whole("best_of", count, low=1) != count:
            raise Refused("best_of must equal n: all replies are returned.", param="best_of")
        echo = fields.flag("echo")
        logprobs = fields.whole("logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
        if echo and logprobs is not None:
            raise Refused(
                "logprobs with echo (those of the prompt) are not supported. `gristmill evaluate` "
                "scores texts.",
                param="echo",
            )
        fields.only("suffix", None)
        length = fields.whole("max_tokens", None, low=1)
        asks = self._asks(fields, prompts, count, length, logprobs, is_chat=False)
        texts = [self.decode(ids) if given is None else given for ids, given in prompts]
        return self._wanted(
            fields, prompts, asks, echoes=[t for t in texts for _ in range(count)] if echo else None
        )

    def chat(self, body: bytes) -> Wanted:
        """What a request to /v1/chat/completions wants; raises Refused."""
        fields = self._fields(body)
        messages = read_messages(fields.take("messages"), self.limits.max_length)
        if self.chat_ids is None:
            raise Refused(
                f"the model {self.model} has no chat template. use /v1/completions, or put a "
                "chat_template.jinja into the model's directory.",
                param="messages",
            )
        if not self.takes_system and any(m["role"] == "system" for m in messages):
            raise Refused(
                f"the chat template of {self.model} has no place for a system prompt. make it part "
                "of the first prompt.",
                param="messages",
            )
        prompts: list[tuple[list[int], str | None]] = [(self.chat_ids(messages), None)]
        count = fields.whole("n", 1, low=1)
        wants_logprobs = fields.flag("logprobs")
        top = fields.whole("top_logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
        if top is not None and not wants_logprobs:
            raise Refused("top_logprobs needs logprobs: true.", param="top_logprobs")
        old = fields.whole("max_tokens", None, low=1)
        length = fields.whole("max_completion_tokens", old, low=1)
        if old is not None and length != old:
            raise Refused(
                f"max_tokens ({old}) and max_completion_tokens ({length}) are two names of one "
                "setting. give one.",
                param="max_tokens",
            )
        _refuse_more_than_text(fields)
        logprobs = (top or 0) if wants_logprobs else None
        asks = self._asks(fields, prompts, count, length, logprobs, is_chat=True)
        return self._wanted(fields, prompts, asks, is_chat=True)

    def check_model(self, name: str) -> None:
        """Raise Refused unless it is the model's name."""
        if name != self.model:
            raise Refused(
                f"there is no model {name[:100]!r} here. the one that is: {self.model!r}.",
                param="model",
                status=404,
                code="model_not_found",
            )

    def _fields(self, body: bytes) -> Fields:
        fields = Fields(body)
        self.check_model(fields.text("model", self.model))
        return fields

    def _prompts(self, prompt: Any) -> list[tuple[list[int], str | None]]:
        """(ids, the text if it was one) of each prompt, in any of the four forms."""
        many = prompt
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and all(is_whole(x) for x in prompt)
        ):
            many = [prompt]
        if not isinstance(many, list) or not many:
            raise Refused(
                "prompt must be a text, a list of texts, a list of token ids or a list of such "
                "lists, and not empty.",
                param="prompt",
            )
        if len(many) > self.limits.max_replies:
            raise Refused(
                f"too many prompts in one request ({len(many)}, at most "
                f"{self.limits.max_replies}).",
                param="prompt",
            )
        return [self._prompt(one) for one in many]

    def _prompt(self, prompt: Any) -> tuple[list[int], str | None]:
        if isinstance(prompt, str):
            ids = self.prompt_ids(prompt)
            if not ids:
                raise Refused(
                    "the prompt is empty, and the model has no token that begins a text.",
                    param="prompt",
                )
            return ids, prompt
        if not isinstance(prompt, list) or not prompt or not all(is_whole(x) for x in prompt):
            raise Refused("each prompt must be a text or a list of token ids.", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.limits.num_ids:
            raise Refused(
                f"token ids go from 0 to {self.limits.num_ids - 1} (got {min(prompt)} to "
                f"{max(prompt)}).",
                param="prompt",
            )
        return prompt, None

    def _asks(
        self,
        fields: Fields,
        prompts: list[tuple[list[int], str | None]],
        count: int,
        length: int | None,
        num_logprobs: int | None,
        *,
        is_chat: bool,
    ) -> list[Ask]:
        """One for each reply: `count` to each prompt."""
        if len(prompts) * count > self.limits.max_replies:
            raise Refused(
                f"too many replies in one request ({len(prompts)} prompts times n {count}, at most "
                f"{self.limits.max_replies} in all).",
                param="n",
            )
        given = self.defaults
        top_k = fields.whole("top_k", given.top_k or 0, low=-1)
        seed = fields.whole("seed", None, low=-(2**63), high=2**63 - 1)
        if seed is None:
            seed = secrets.randbits(62)
        stop_ids = self.chat_stop_ids if is_chat else self.stop_ids
        if fields.flag("ignore_eos"):
            stop_ids = frozenset()
        how: dict[str, Any] = {
            "temperature": fields.number("temperature", given.temperature, low=0, high=100),
            "top_k": None if top_k < 1 else top_k,
            "top_p": fields.number("top_p", given.top_p, low=0, high=1),
            "min_p": fields.number("min_p", 0.0, low=0, high=1),
            "repetition_penalty": fields.number("repetition_penalty", 1.0, low=0.01, high=100),
            "presence_penalty": fields.number("presence_penalty", 0.0, low=-2, high=2),
            "frequency_penalty": fields.number("frequency_penalty", 0.0, low=-2, high=2),
            "logit_bias": _read_bias(fields.take("logit_bias", None), self.limits.num_ids),
            "stops": _read_stops(fields.take("stop", None)),
            "num_logprobs": num_logprobs,
            "goes_on": not is_chat,
            "stop_ids": stop_ids,
        }
        most = None
        if num_logprobs is not None and length is None:
            most = max(1, MAX_LOGPROBS // ((1 + num_logprobs) * count * len(prompts)))
        asks = [
            # Seeds wrap around where numbers do.
            Ask(ids=ids, max_new_tokens=room, seed=(seed + i) % 2**63, **how)
            for ids, room in ((ids, self._room(ids, length, is_chat, most)) for ids, _ in prompts)
            for i in range(count)
        ]
        if num_logprobs is not None:
            _check_logprobs(sum(ask.max_new_tokens for ask in asks), num_logprobs)
        return asks

    def _room(self, ids: list[int], length: int | None, is_chat: bool, most: int | None) -> int:
        """How long a reply may be, at `most` where no length was asked for.

        Raises Refused when prompt and reply do not fit.
        """
        limit = self.limits.max_length
        room = limit - len(ids)
        if room < 1 or (length is not None and length > room):
            wanted = "" if length is None else f" and {length} of the reply"
            raise Refused(
                f"prompt and reply together have at most {limit} tokens here ({len(ids)} of the "
                f"prompt{wanted}). shorten the prompt or ask for fewer.",
                param="messages" if is_chat else "prompt",
                code="context_length_exceeded",
            )
        if length is None:
            length = self.defaults.max_new_tokens or (room if is_chat else COMPLETION_TOKENS)
            length = min(length, most or length)
        return min(length, room)

    @staticmethod
    def _wanted(
        fields: Fields,
        prompts: list[tuple[list[int], str | None]],
        asks: list[Ask],
        *,
        is_chat: bool = False,
        echoes: list[str] | None = None,
    ) -> Wanted:
        stream = fields.flag("stream")
        options = fields.take("stream_options", None)
        include_usage = False
        if options is not None:
            if not stream or not isinstance(options, dict):
                raise Refused(
                    "stream_options is an object, beside stream: true.", param="stream_options"
                )
            usage = options.pop("include_usage", None)
            include_usage = usage is True
            if not isinstance(usage, bool | None):
                raise Refused("include_usage must be true or false.", param="stream_options")
            # Padding against listeners who guess from sizes; over the wire here there is none.
            if options.pop("include_obfuscation", False) or options:
                raise Refused("stream_options knows include_usage only.", param="stream_options")
        fields.end()
        return Wanted(
            asks=asks,
            is_chat=is_chat,
            stream=stream,
            include_usage=include_usage,
            num_prompt_tokens=sum(len(ids) for ids, _ in prompts),
            echoes=echoes,
        )


def read_messages(messages: Any, max_length: int) -> list[dict[str, Any]]:
    """The messages of a conversation as templates take them: each a role and a text.

    Raises Refused for another form, and for more than `max_length` tokens can hold.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused(
            'messages must be a list such as [{"role": "user", "content": "Hello"}], not empty.',
            param="messages",
        )
    if len(messages) > max_length:
        raise Refused(
            f"prompt and reply together have at most {max_length} tokens here, fewer than there "
            f"are messages ({len(messages)}). send the newest.",
            param="messages",
            code="context_length_exceeded",
        )
    return [_read_message(message, number) for number, message in enumerate(messages)]


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _read_message(message: Any, number: int) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise Refused(f"{where} must be an object with role and content.", param=where)
    left = {key: value for key, value in message.items() if value is not None}
    role, content = left.pop("role", None), left.pop("content", None)
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(
            f"the role of {where} must be system, developer, user or assistant (got {role!r}).",
            param=f"{where}.role",
        )
    if isinstance(content, list):
        content = _read_parts(content, where)
    if not isinstance(content, str):
        raise Refused(f"the content of {where} must be a text.", param=f"{where}.content")
    read = {"role": _ROLES[role], "content": content}
    if (name := left.pop("name", None)) is not None:
        if not isinstance(name, str):
            raise Refused(f"the name of {where} must be a text.", param=f"{where}.name")
        read["name"] = name
    if left:
        raise Refused(f"{where} has what is not supported: {', '.join(left)}.", param=where)
    return read


def _read_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Refused(
                f"{where} has a part that is no text ({kind}). this model reads text only.",
                param=f"{where}.content",
            )
        texts.append(part["text"])
    return "".join(texts)


def _refuse_more_than_text(fields: Fields) -> None:
    """Refuse what asks for tools, sound, pictures or structure; their empty forms are fine."""
    fields.only("tools", [])
    fields.only("functions", [])
    # Without tools there is nothing to choose or to call at once.
    fields.only("tool_choice", "none", "auto")
    fields.only("function_call", "none", "auto")
    fields.only("parallel_tool_calls", True, False)
    fields.only("response_format", {"type": "text"})
    fields.only("modalities", ["text"])
    fields.only("reasoning_effort", "none")
    fields.only("store", False)


def _check_logprobs(num_tokens: int, num_logprobs: int) -> None:
    """Refuse more of them than an answer can hold."""
    if num_tokens * (1 + num_logprobs) > MAX_LOGPROBS:
        raise Refused(
            f"too many log-probabilities ({num_tokens:,} tokens in all replies, {1 + num_logprobs} "
            f"for each; at most {MAX_LOGPROBS:,} in all). ask for fewer tokens or fewer of them.",
            param="logprobs",
        )


def _read_stops(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops)
    ):
        raise Refused(
            f"stop must be a text or a list of at most {MAX_STOPS} texts, each of 1 to "
            f"{MAX_STOP_CHARS} characters.",
            param="stop",
        )
    return tuple(stops)


def _read_bias(bias: Any, num_ids: int) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, dict) or not all(
        key.isascii()
        and key.isdigit()
        and len(key) < 10
        and int(key) < num_ids
        and is_number(value)
        and -100 <= value <= 100
        for key, value in bias.items()
    ):
        raise Refused(
            f"logit_bias must map token ids (0 to {num_ids - 1}, as texts) to numbers from -100 to "
            "100.",
            param="logit_bias",
        )
    if len(bias) > MAX_BIASES:
        raise Refused(
            f"logit_bias has {len(bias)} entries, at most {MAX_BIASES:,} are taken.",
            param="logit_bias",
        )
    read = {int(key): float(value) for key, value in bias.items()}
    if len(read) < len(bias):  # "7" and "07", of which only one could count
        raise Refused("logit_bias names a token id twice.", param="logit_bias")
    return read

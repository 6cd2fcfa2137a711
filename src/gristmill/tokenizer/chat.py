"""Chat templates: a conversation as the one text that a model was trained to continue."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

NONCHARACTER = "\ufdd0"
"""Stands in no text; put inside the text of a special token it tells a user's from a template's."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    bos_token: str | None,
    eos_token: str | None,
    **variables: Any,
) -> str:
    """The conversation `messages` (role, content) as text, by the rules of `template`.

    Templates see what `transformers` gives them, in a sandbox: `raise_exception`, `strftime_now`,
    `tojson`, `{% break %}`, `{% generation %}`; further `variables` are theirs too. Raises
    UserError with the template's own words when it fails or refuses the conversation.
    """
    named = {"bos_token": bos_token, "eos_token": eos_token}
    # A token that does not exist is undefined, which prints nothing; None would print "None".
    tokens = {name: token for name, token in named.items() if token is not None}
    defaults: dict[str, Any] = {"tools": None, "documents": None}
    try:
        text: str = _compile(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **{**defaults, **tokens, **variables},
        )
    except _Refused as error:
        raise UserError(
            f"the chat template refuses this conversation ({error}). change the messages."
        ) from error
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the chat template fails ({type(error).__name__}: {error}). correct "
            "chat_template.jinja (or chat_template in tokenizer_config.json) of the model."
        ) from error
    return text


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    **variables: Any,
) -> list[int]:
    """The ids of a conversation, as the tokenizer's chat template writes it.

    Special tokens that the template writes become their ids; the text of one that somebody wrote in
    a message stays text, so that no message can end itself or begin a turn of somebody else. Raises
    UserError as `render`, and where there is no template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer in {tokenizer.path.parent} has no chat template. give text instead of "
            "messages, or put a chat_template.jinja into that directory."
        )
    marked = _Marked(tokenizer, messages)
    text = render(
        tokenizer.chat_template,
        marked.messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        **variables,
    )
    return marked.encode(text)


class _Marked:
    """Messages in which special tokens are broken by a mark, and the ids of what becomes of them.

    Where no message has such a token, the text is encoded in one go, as everybody does. Else it is
    parted at the template's tokens, and the parts with a mark are encoded as plain text.
    """

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> None:
        self._tokenizer = tokenizer
        written = json.dumps(list(messages), ensure_ascii=False, default=str)
        self._mark = NONCHARACTER
        while self._mark in written:
            self._mark += NONCHARACTER
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        tokens = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._special = re.compile(f"(?:{tokens})(?!{self._mark})")
        self.messages: list[Any] = [self._broken(dict(message)) for message in messages]

    def encode(self, text: str) -> list[int]:
        """The ids of the rendered messages."""
        encode = self._tokenizer.encode
        if self._mark not in text:
            return encode(text, special=True)
        ids: list[int] = []
        done = start = 0
        places = [match.span() for match in self._special.finditer(text)]
        for before, after in [*places, (len(text), len(text))]:
            if self._mark in text[start:before]:
                ids += encode(text[done:start], special=True)
                ids += encode(text[start:before].replace(self._mark, ""))
                done = before
            start = after
        return ids + encode(text[done:], special=True)

    def _broken(self, value: Any) -> Any:
        """The value with marks inside every special token of its texts."""
        if isinstance(value, str):
            # After each character: a token can have another one in it.
            return self._special.sub(lambda m: "".join(c + self._mark for c in m[0]), value)
        if isinstance(value, Mapping):
            return {key: self._broken(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._broken(item) for item in value]
        return value


class _Refused(TemplateError):
    """A template's own objection, raised through `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

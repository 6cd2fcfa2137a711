"""Chat templates: a conversation as the one text that a model was trained to continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gristmill.util.errors import UserError


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

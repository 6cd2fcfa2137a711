"""How a prompt becomes text: styles as chat templates, so that whoever loads the model has them."""

from __future__ import annotations

from pathlib import Path

from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

OWN = "chat"
"""The style that is the model's own chat template."""

_ALONE = "Below is an instruction that describes a task. "
_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
)
_WRITE = "Write a response that appropriately completes the request.\\n\\n"
_INSTRUCTION = "'### Instruction:\\n' + message['content'] + '\\n\\n'"
_INPUT = "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}"
_ANSWER = "{{ message['content'] + (eos_token or '') }}"


def _instructions(alone: str, paired: str) -> str:
    """A preamble (or the system message in its place), instructions and responses under headings.

    The format of Stanford Alpaca (2023); `input` of a message is what an instruction is about.
    """
    preamble = (
        "{% if loop.first %}{% if message['input'] %}{{ '" + paired + _WRITE + "' }}"
        "{% else %}{{ '" + alone + _WRITE + "' }}{% endif %}{% endif %}"
    )
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        + preamble
        + "{{ "
        + _INSTRUCTION
        + " }}"
        + _INPUT
        + "{{ '### Response:\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        + _ANSWER
        + "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
        "{% else %}{{ raise_exception('no place for a message of ' + message['role']) }}"
        "{% endif %}{% endfor %}"
    )


_PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + _ANSWER + "{% else %}{{ message['content'] }}"
    "{% if message['input'] %}{{ '\\n\\n' + message['input'] }}{% endif %}"
    "{% endif %}{% endfor %}"
)


def styles() -> dict[str, str]:
    """Name of each style and its template, without the beginning-of-sequence token."""
    return {
        "alpaca": _instructions(_ALONE, _PAIRED),
        "flan": _instructions(_ALONE, _ALONE),
        "longform": _instructions(_PAIRED, _PAIRED),
        "default": _PLAIN,
    }


def choose_template(style: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """(name, template) of the style that was asked for.

    A model that was made for texts that begin with BOS gets one. Raises UserError for a style that
    does not exist, or a chat template that the model lacks.
    """
    own = tokenizer.chat_template
    if style == "auto":
        style = OWN if own is not None else "alpaca"
    if style == OWN:
        if own is None:
            raise UserError(
                "--data.prompt_style chat: the model has no chat template. Use alpaca, give a "
                "Jinja template, or put a chat_template.jinja into the model's directory.",
                {"--data.prompt_style": "alpaca"},
            )
        return OWN, own
    known = styles()
    if style in known:
        return style, ("{{ bos_token }}" if tokenizer.adds_bos else "") + known[style]
    if "{{" in style or "{%" in style:
        return "a template of yours", style
    path = Path(style).expanduser()
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        try:
            return path.name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data.prompt_style {style} cannot be read ({error}).") from None
    raise UserError(
        f"--data.prompt_style {style} is not known. Use auto, {OWN} (the model's own chat "
        f"template), {', '.join(known)}, or a Jinja chat template (text, or a .jinja file).",
        {"--data.prompt_style": "auto"},
    )

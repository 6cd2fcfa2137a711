"""Prompt styles of LitGPT as chat templates, so that what was trained with one is asked in it.

The styles themselves are data: `prompt_styles.yaml`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gristmill.util.errors import UserError

FILE = "prompt_style.yaml"
"""What LitGPT's finetuning leaves beside the weights."""

MODULE = "litgpt.prompts"
"""Where its own styles are; people may have others."""


def read_style(folder: Path) -> str | None:
    """The class that a checkpoint of LitGPT names, None where none is; it need not be known."""
    try:
        said = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
        path = str(said["class_path"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(
            f"{folder / FILE} cannot be read. write `class_path: {MODULE}.Alpaca` into it, or "
            "remove it."
        ) from None
    return path.removeprefix(f"{MODULE}.")


def write_style(folder: Path, kind: str) -> None:
    """Name the class in a checkpoint for LitGPT."""
    (folder / FILE).write_text(f"class_path: {MODULE}.{kind}\n", encoding="utf-8")


def names() -> dict[str, str]:
    """Short name of each style, and its class."""
    return {style["name"]: kind for kind, style in _styles().items()}


def is_known(kind: str) -> bool:
    """Whether there is a template for a class."""
    return kind in _styles()


def template(kind: str, *, bos_token: str | None) -> str:
    """The chat template of a class that is known; `bos_token` begins the text, None: nothing does.

    Messages may have an `input` beside their content: what an instruction is about.
    """
    style = _styles()[kind]
    begin = style.get("begin", "")
    if bos_token is not None and begin != bos_token:
        begin = bos_token + begin
    return (
        _said(begin)
        + "{% for message in messages %}"
        + _system(style)
        + "{% elif message['role'] == 'user' %}"
        + _question(style)
        + "{% elif message['role'] == 'assistant' %}{{ message['content'] }}"
        + (_said(style["end"]) if "end" in style else "{{ eos_token or '' }}")
        + "{% else %}{{ raise_exception('no place for a message of ' + message['role']) }}"
        "{% endif %}{% endfor %}"
    )


def kind_of(chat_template: str | None, bos_token: str | None) -> str | None:
    """The class that `template` makes this of, None where none is."""
    for kind in _styles():
        if chat_template in (template(kind, bos_token=bos_token), template(kind, bos_token=None)):
            return kind
    return None


def _system(style: dict[str, Any]) -> str:
    """The branch of a system prompt, the first of the template."""
    refused = "{{ raise_exception('no place for a system prompt here') }}"
    first = "{% if message['role'] == 'system' %}{% if not loop.first %}" + refused
    if "system" not in style:
        return first + "{% else %}" + refused + "{% endif %}"
    if "inside" in style:  # said with the question
        return first + "{% endif %}"
    return first + "{% else %}" + _around(style["system"], "message['content']") + "{% endif %}"


def _question(style: dict[str, Any]) -> str:
    """The branch of a question, up to where the answer begins."""
    before, _, after = style["user"].partition("{}")
    content = "{{ message['content'] }}"
    own_input = "{% if message['input'] %}" + (
        _around(style["input"], "message['input']")
        if "input" in style
        else "{{ '\\n\\n' + message['input'] }}"
    )
    own_input += "{% endif %}"
    default, inside = _default(style), _said(style.get("inside", ""))
    if inside:
        given = "{% elif loop.index0 == 1 and messages[0]['role'] == 'system' %}"
        given += _around(style["system"], "messages[0]['content']")
        opening = _between(style) + inside
        opening += "{% if loop.first %}" + default + given + "{% endif %}" + _said(before)
    else:
        opening = "{% if loop.first %}" + default + "{% endif %}" + _between(style) + _said(before)
    if "input" in style:
        return opening + content + _said(after) + own_input + _said(style.get("reply", ""))
    return opening + content + own_input + _said(after + style.get("reply", ""))


def _default(style: dict[str, Any]) -> str:
    """The system prompt of a conversation that has none."""
    if style.get("default") is None:
        return ""
    said = _said(style["system"].replace("{}", style["default"]))
    if "default_with_input" not in style:
        return said
    other = _said(style["system"].replace("{}", style["default_with_input"]))
    return "{% if message['input'] %}" + other + "{% else %}" + said + "{% endif %}"


def _between(style: dict[str, Any]) -> str:
    """What stands before a question that follows an answer."""
    if "between" not in style:
        return ""
    follows = "{% if loop.previtem and loop.previtem['role'] == 'assistant' %}"
    return follows + _said(style["between"]) + "{% endif %}"


def _around(pattern: str, value: str) -> str:
    """The pattern with a value of the template's in it."""
    before, _, after = pattern.partition("{}")
    return _said(before) + "{{ " + value + " }}" + _said(after)


def _said(text: str) -> str:
    """A text as it stands."""
    return "{{ " + json.dumps(text) + " }}" if text else ""


@cache
def _styles() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_suffix(".yaml")
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found

"""The prompts of a command: one of its own, one through a pipe, or many from a file."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.util.errors import UserError

DEFAULT = "What food do llamas eat?"
STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or the `messages` of a chat to answer.

    `fields` is what its JSON line holds, the prompt included; `place` says where it stood.
    """

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    place: str = "the prompt"


def read_prompts(prompt: str | None, prompt_file: str | None) -> list[Prompt]:
    """The prompts that these options name; unset ones leave a pipe, or the default prompt.

    Raises UserError for both at once, a file that is not there or not text, JSON of another form,
    and nothing at all in a file or pipe.
    """
    if prompt is not None and prompt_file is not None:
        raise UserError("--prompt and --prompt_file are both given. leave one of them out.")
    if prompt_file is None:
        if prompt is None:
            prompt = _from_pipe() if is_piped() else DEFAULT
        return [Prompt(prompt, fields={"prompt": prompt})]
    name = "the input" if prompt_file == STDIN else prompt_file
    text = _text_of(prompt_file)
    found = list(_parsed(text, name, Path(prompt_file).suffix.lower()))
    if not found:
        raise UserError(f"there is no prompt in {name}. write one a line.")
    return found


def is_piped() -> bool:
    """Whether the command's input is a pipe or a file, and not a terminal or nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _from_pipe() -> str:
    """The whole input as one prompt, without the line break that ends it."""
    text = _decoded(_read_input(), "the input").removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError(
            'the prompt that came through the pipe is empty. pipe some text, or give --prompt "…".'
        )
    return text


def _text_of(prompt_file: str) -> str:
    if prompt_file == STDIN:
        return _decoded(_read_input(), "the input")
    path = Path(prompt_file).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {prompt_file} ({error.strerror}). name a file with a prompt on each line."
        ) from error
    return _decoded(content, prompt_file)


def _read_input() -> bytes:
    if sys.stdin.isatty():
        sys.stderr.write("Reading prompts; Ctrl-D ends them.\n")
    # A text stream put in its place, as tests do, has no bytes.
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode() if buffer is None else buffer.read()


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 (byte {error.start}). save it as UTF-8, for example with iconv."
        ) from error


def _parsed(text: str, name: str, suffix: str) -> Iterator[Prompt]:
    """The prompts of a file: of JSON lines, of a JSON list, or a prompt on each line."""
    if suffix == ".json":
        values = _json(text, name)
        if not isinstance(values, list):
            raise UserError(f"{name} holds no list. write a list of prompts, or JSON lines.")
        for number, value in enumerate(values, start=1):
            yield _from_json(value, f"item {number} of {name}")
        return
    lines = [line.rstrip("\r") for line in text.split("\n")]
    as_json = suffix in JSON_LINES or (not suffix and _begins_with_object(lines))
    for number, line in enumerate(lines, start=1):
        place = f"line {number} of {name}"
        if not line.strip():
            continue
        if as_json:
            yield _from_json(_json(line, place), place)
        else:
            yield Prompt(line, fields={"prompt": line}, place=place)


def _begins_with_object(lines: list[str]) -> bool:
    first = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(
            f'{place} is no JSON ({error}). write {{"prompt": "…"}} on each line, or plain '
            "lines in a file that ends in .txt."
        ) from error


def _from_json(value: Any, place: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(value, fields={"prompt": value}, place=place)
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UserError(
            f"{place} has no prompt (found: {found or 'nothing'}). give each line either "
            "`prompt` or `messages`."
        )
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise UserError(f"the prompt in {place} is no text. put it into quotes.")
        return Prompt(value["prompt"], fields=value, place=place)
    messages = value["messages"]
    if not is_conversation(messages):
        raise UserError(
            f'the messages in {place} are no conversation. write them as [{{"role": "user", '
            '"content": "…"}].'
        )
    return Prompt(messages=tuple(messages), fields=value, place=place)


def is_conversation(messages: Any) -> bool:
    """Whether it is a list of one message or more, each with a role and a content."""
    return (
        isinstance(messages, (list, tuple))
        and len(messages) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), (str, list))
            for message in messages
        )
    )

"""Records of any known form as conversations: lists of messages with a role and a content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gristmill.util.errors import UserError

PROMPTS = ("instruction", "prompt", "question", "inputs")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer", "targets")
"""Names of the fields of a record with a prompt and an answer, in the forms that are around."""

CHATS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Names of roles in chats of other tools."""

SHOWN = 3
"""Bad records that a message names."""


class BadRecord(Exception):
    """A record that cannot be used, and why."""


@dataclass(frozen=True)
class Conversation:
    """Messages (role, content, perhaps `input` and `weight`), and the tools they may call."""

    messages: list[dict[str, Any]]
    tools: Any = None


@dataclass
class Skipped:
    """Records that were left out: how many, and the first ones' reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)


def read_conversations(
    records: Iterable[Any], where: str, *, multiturn: bool = True, skip: bool = False
) -> tuple[list[Conversation], Skipped]:
    """The conversations that records of one file (named `where`) mean.

    Raises UserError naming the first records that are none, unless they are to be skipped.
    """
    found: list[Conversation] = []
    skipped = Skipped()
    for number, record in enumerate(records, start=1):
        try:
            found.append(conversation(record, multiturn=multiturn))
        except BadRecord as reason:
            skipped.count += 1
            if len(skipped.reasons) < SHOWN:
                skipped.reasons.append(f"record {number}: {reason}")
    if skipped.count and not (skip and found):
        more = skipped.count - len(skipped.reasons)
        named = "; ".join(skipped.reasons) + (f"; and {more:,} more" if more else "")
        fix = {"--data.on_error": "skip"} if found else None
        also = ", or leave such records out with --data.on_error skip" if found else ""
        raise UserError(
            f"{where} has records that cannot be used ({named}). Correct them{also}.", fix
        )
    return found, skipped


def conversation(record: Any, *, multiturn: bool = True) -> Conversation:
    """The conversation of one record. Raises BadRecord."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"it is {_kind(record)}, not an object with fields")
    for name in CHATS:
        if record.get(name) is not None:
            return _chat(record[name], record, multiturn=multiturn)
    prompt = _first(record, PROMPTS)
    context, answer = _first(record, CONTEXTS), _first(record, ANSWERS)
    if prompt is None and context is not None:  # LongForm calls the instruction its input
        prompt, context = context, None
    if prompt is None or answer is None:
        if set(record) & set(ANSWERS + PROMPTS) == set() and isinstance(record.get("text"), str):
            raise BadRecord(
                "it is plain text, for `gristmill pretrain --initial_checkpoint_dir MODEL`"
            )
        lacking = "prompt" if prompt is None else "answer"
        known = PROMPTS if prompt is None else ANSWERS
        raise BadRecord(
            f"it has no {lacking} ({_names(known)}) and no chat ({_names(CHATS)}), only "
            f"{_names(record) or 'nothing'}"
        )
    if isinstance(prompt, list) and isinstance(answer, list):  # both are parts of a chat
        return _chat([*prompt, *answer], record, multiturn=multiturn)
    user = {"role": "user", "content": _text(prompt)}
    if context is not None and _text(context):
        user["input"] = _text(context)
    system = record.get("system")
    messages = [{"role": "system", "content": _text(system)}] if system else []
    messages += [user, {"role": "assistant", "content": _text(answer)}]
    return _checked(messages, record.get("tools"))


def with_inputs_inline(talk: Conversation) -> Conversation:
    """The conversation for templates that know nothing of `input`: it follows the prompt."""
    messages = []
    for message in talk.messages:
        plain = {key: value for key, value in message.items() if key != "input"}
        if message.get("input"):
            plain["content"] = f"{message['content']}\n\n{message['input']}"
        messages.append(plain)
    return Conversation(messages, talk.tools)


def _chat(given: Any, record: Mapping[str, Any], *, multiturn: bool) -> Conversation:
    if not isinstance(given, list) or not given:
        raise BadRecord(f"its chat is {_kind(given)}, not a list of messages")
    given = [_without_nulls(message) for message in given]
    messages = []
    if record.get("system") and _role(given[0]) != "system":
        messages.append({"role": "system", "content": _text(record["system"])})
    for number, message in enumerate(given):
        if isinstance(message, str):  # LIMA: the two take turns
            messages.append({"role": ("user", "assistant")[number % 2], "content": message})
            continue
        if not isinstance(message, Mapping):
            raise BadRecord(f"message {number + 1} is {_kind(message)}, not an object")
        role = _role(message)
        if role is None:
            raise BadRecord(f"message {number + 1} has no role")
        content = message.get("content", message.get("value"))
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        # A call of a tool has no words of its own.
        plain = "" if content is None and rest.get("tool_calls") else _text(content, number + 1)
        messages.append({**rest, "role": role, "content": plain})
    if not multiturn:
        messages = _first_turn(messages)
    return _checked(messages, record.get("tools"))


def _without_nulls(message: Any) -> Any:
    """The message without null fields: parquet has every field of one message in all of them."""
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if value is not None}


def _first_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            return messages[: number + 1]
    return messages


def _checked(messages: list[dict[str, Any]], tools: Any) -> Conversation:
    answers = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    if not answers:
        raise BadRecord("nobody answers in it")
    if messages[0]["role"] == "assistant":
        raise BadRecord("it begins with an answer")
    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise BadRecord("its answer is empty")
    return Conversation(messages, tools)


def _role(message: Any) -> str | None:
    role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    return ROLES.get(role, role) if isinstance(role, str) and role else None


def _first(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text(value: Any, number: int | None = None) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else None
    if parts and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        return "".join(p["text"] for p in parts)
    where = "a text of it" if number is None else f"the content of message {number}"
    raise BadRecord(f"{where} is {_kind(value)}")


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    kinds: dict[type, str] = {list: "a list", str: "text", bool: "true or false", dict: "an object"}
    return kinds.get(type(value)) or f"{value!r}"[:40]


def _names(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))

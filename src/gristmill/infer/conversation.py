"""What has been said in a chat, as the ids that the model reads next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from gristmill.infer.load import LoadedModel
from gristmill.tokenizer.chat import encode_chat, render
from gristmill.util.errors import UserError

Message = Mapping[str, Any]


def chat_ids(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """The ids after which the model's reply to the `messages` (role, content) begins.

    The template writes BOS itself where the model wants it. Raises UserError where there is no
    template, or it refuses the messages.
    """
    require_template(loaded, "messages")
    return loaded.checked(encode_chat(loaded.tokenizer, messages, add_generation_prompt=True))


def reply_stop_ids(loaded: LoadedModel) -> frozenset[int]:
    """Ids that end a reply: the tokenizer's, and what its template puts behind a reply."""
    tokenizer = loaded.tokenizer
    stop = frozenset(tokenizer.stop_ids)
    if tokenizer.chat_template is None:
        return stop
    mark = "0123456789"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": mark}]
    behind = _rendered(loaded, turns, reply_next=False).partition(mark)[2].lstrip()
    first = tokenizer.encode(behind, special=True)[:1]
    # An ordinary token there (a line break, say) may well be part of a reply.
    return stop if first == tokenizer.encode(behind)[:1] else stop | set(first)


def require_template(loaded: LoadedModel, what: str) -> None:
    """Raise UserError unless the model has a chat template, which `what` needs."""
    if loaded.tokenizer.chat_template is None:
        raise UserError(
            f"{what} needs a chat template, and {loaded.name} has none. leave it out, or put a "
            "chat_template.jinja into the model's directory."
        )


def check_system(loaded: LoadedModel, system: str) -> None:
    """Raise UserError where the model's template has no place for a system prompt."""
    require_template(loaded, "--system")
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    if system.strip() not in _rendered(loaded, turns, reply_next=True):
        raise UserError(
            f"the chat template of {loaded.name} has no place for a system prompt. "
            "leave --system out, or make it part of the first prompt."
        )


def _rendered(loaded: LoadedModel, turns: Sequence[Message], *, reply_next: bool) -> str:
    tokenizer = loaded.tokenizer
    assert tokenizer.chat_template is not None
    return render(
        tokenizer.chat_template,
        turns,
        add_generation_prompt=reply_next,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


class Conversation:
    """The turns of a chat, rendered with the model's chat template.

    A model without one (a base model) is given each prompt as it stands, without the earlier ones.
    `room` is how many tokens a reply may take: the oldest turns are forgotten to keep it free, but
    for no more than a quarter of the context, which a reply seldom takes and memory can use.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None, *, room: int) -> None:
        self._loaded = loaded
        self._room = min(room, loaded.limit // 4)
        self._turns: list[Message] = []
        self._system: list[Message] = []
        if system is not None:
            check_system(loaded, system)
            self._system = [{"role": "system", "content": system}]

    @property
    def has_template(self) -> bool:
        """Whether the model's files carry a chat template."""
        return self._loaded.tokenizer.chat_template is not None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply."""
        return reply_stop_ids(self._loaded)

    def ask(self, prompt: str) -> tuple[list[int], int]:
        """The ids to continue for the user's next turn, and how many old turns were forgotten.

        Raises UserError, and takes the turn back, when it does not fit into the context at all or
        the template refuses it.
        """
        before = self._turns
        try:
            return self._asked(prompt)
        except UserError:
            self._turns = before
            raise

    def _asked(self, prompt: str) -> tuple[list[int], int]:
        loaded, forgotten = self._loaded, 0
        if not self.has_template:
            ids = loaded.prompt_ids(prompt)
        else:
            self._turns = [*self._turns, {"role": "user", "content": prompt}]
            ids = self._ids()
            while len(ids) + self._room > loaded.limit and len(self._turns) > 1:
                self._turns = self._turns[2:]
                forgotten += 1
                ids = self._ids()
        if len(ids) >= loaded.limit:
            raise UserError(
                f"the prompt is longer than the model's context ({len(ids)} tokens of "
                f"{loaded.limit}). give a shorter one."
            )
        return ids, forgotten

    def answered(self, reply: str) -> None:
        """Remember what the model said to the last prompt."""
        if self.has_template:
            self._turns.append({"role": "assistant", "content": reply})

    def clear(self) -> None:
        """Forget all that was said; the system prompt stays."""
        self._turns = []

    def _ids(self) -> list[int]:
        return chat_ids(self._loaded, [*self._system, *self._turns])

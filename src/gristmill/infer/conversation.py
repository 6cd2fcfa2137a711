"""What has been said in a chat, as the ids that the model reads next."""

from __future__ import annotations

from functools import cached_property

from gristmill.infer.load import LoadedModel
from gristmill.tokenizer.chat import render
from gristmill.util.errors import UserError

Message = dict[str, str]


class Conversation:
    """The turns of a chat, rendered with the model's chat template.

    A model without one (a base model) is given each prompt as it stands, without the earlier ones.
    `room` is how many tokens a reply may take: the oldest turns are forgotten to keep it free.
    """

    def __init__(self, loaded: LoadedModel, system: str | None = None, *, room: int) -> None:
        self._loaded = loaded
        self._room = room
        self._turns: list[Message] = []
        self._system: list[Message] = []
        if system is not None:
            self._system = [{"role": "system", "content": system}]
            self._check_system(system)

    @property
    def has_template(self) -> bool:
        """Whether the model's files carry a chat template."""
        return self._loaded.tokenizer.chat_template is not None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: the tokenizer's, and what the template puts behind a reply."""
        stop = frozenset(self._loaded.tokenizer.stop_ids)
        if not self.has_template:
            return stop
        mark = "0123456789"
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": mark}]
        behind = self._render(turns, reply_next=False).partition(mark)[2].lstrip()
        tokenizer = self._loaded.tokenizer
        first = tokenizer.encode(behind, special=True)[:1]
        # An ordinary token there (a line break, say) may well be part of a reply.
        return stop if first == tokenizer.encode(behind)[:1] else stop | set(first)

    def ask(self, prompt: str) -> tuple[list[int], int]:
        """The ids to continue for the user's next turn, and how many old turns were forgotten.

        Raises UserError, and takes the turn back, when it does not fit into the context at all.
        """
        loaded = self._loaded
        before, forgotten = list(self._turns), 0
        if not self.has_template:
            ids = loaded.prompt_ids(prompt)
        else:
            self._turns.append({"role": "user", "content": prompt})
            ids = self._ids()
            while len(ids) + self._room > loaded.limit and len(self._turns) > 1:
                del self._turns[:2]
                forgotten += 1
                ids = self._ids()
        if len(ids) >= loaded.limit:
            self._turns = before
            raise UserError(
                f"the prompt is longer than the model's context ({len(ids)} tokens of "
                f"{loaded.limit}). give a shorter one."
            )
        return ids, forgotten

    def answered(self, reply: str) -> None:
        """Remember what the model said to the last prompt."""
        if self.has_template:
            self._turns.append({"role": "assistant", "content": reply})

    def _ids(self) -> list[int]:
        text = self._render(self._turns, reply_next=True)
        # The template writes BOS itself where the model wants it.
        return self._loaded.checked(self._loaded.tokenizer.encode(text, special=True))

    def _render(self, turns: list[Message], *, reply_next: bool) -> str:
        tokenizer = self._loaded.tokenizer
        assert tokenizer.chat_template is not None
        return render(
            tokenizer.chat_template,
            self._system + turns,
            add_generation_prompt=reply_next,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )

    def _check_system(self, system: str) -> None:
        if not self.has_template:
            raise UserError(
                f"--system needs a chat template, and {self._loaded.name} has none. leave "
                "--system out, or put a chat_template.jinja into the model's directory."
            )
        turns = [{"role": "user", "content": "Hello"}]
        if system.strip() not in self._render(turns, reply_next=True):
            raise UserError(
                f"the chat template of {self._loaded.name} has no place for a system prompt. "
                "leave --system out, or make it part of the first prompt."
            )

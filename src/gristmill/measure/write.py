"""Texts that a model writes for tasks: greedily or drawn, up to what ends them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gristmill.config.use_commands import Sampling
from gristmill.infer.load import LoadedModel
from gristmill.infer.many import Ending, Task, choose_rows, write_texts
from gristmill.measure.encode import Encoder
from gristmill.util.errors import UserError

MAX_NEW_TOKENS = 256
"""Where a task names none, as in lm-evaluation-harness."""

LENGTH_WORDS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False}
"""Settings of other tools' generation that mean nothing at these values."""


class Prompt(NamedTuple):
    """A text to continue, and how: the words of a task's `generation_kwargs`."""

    text: str
    settings: Mapping[str, Any]
    seed: int = 0


class Writer:
    """Writes what tasks ask for with a model, several texts at a time."""

    def __init__(self, loaded: LoadedModel, batch_size: int | str) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        self.shortened = 0
        """Prompts that lost their beginning to leave room for what is written."""
        self._encoder = Encoder(loaded.tokenizer)

    def texts(
        self, prompts: Sequence[Prompt], done: Callable[[int, str], None] | None = None
    ) -> list[str]:
        """What follows each prompt, without the text that ended it; `done` is told of each.

        Raises UserError for settings that this cannot do, and for more new tokens than the model's
        context has.
        """
        alike: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            key = json.dumps(prompt.settings, sort_keys=True, default=str)
            alike.setdefault(key, []).append(number)
        written = [""] * len(prompts)
        for numbers in alike.values():
            self._write(prompts, numbers, written, done)
        return written

    def _write(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        written: list[str],
        done: Callable[[int, str], None] | None,
    ) -> None:
        """Continue the prompts of some numbers, which have their settings in common."""
        sampling = self.sampling(prompts[numbers[0]].settings)
        ids = {number: self._ids(prompts[number].text, sampling) for number in numbers}
        # Long ones first: the rows of a batch then end at about the same time.
        order = sorted(numbers, key=lambda number: -len(ids[number]))
        tasks = [Task(ids[number], prompts[number].seed, goes_on=False) for number in order]
        rows = choose_rows(self.loaded, self.batch_size, tasks, sampling)
        for place, piece in write_texts(self.loaded, tasks, sampling, rows=rows):
            if not isinstance(piece, Ending):
                written[order[place]] += piece
            elif done is not None:
                done(order[place], written[order[place]])

    def _ids(self, text: str, sampling: Sampling) -> list[int]:
        room = self.loaded.limit - sampling.max_new_tokens
        ids = self._encoder.encode(text) or [self._encoder.prefix_id]
        self.shortened += len(ids) > room
        return self.loaded.checked(ids[-room:])

    def sampling(self, settings: Mapping[str, Any]) -> Sampling:
        """The settings of a task in our words. Raises UserError for what cannot be done."""
        words = {key: value for key, value in settings.items() if value not in (None, "None")}
        stops = words.pop("until", [])
        stops = [stops] if isinstance(stops, str) else list(stops)
        eos = self.loaded.tokenizer.eos_token
        lengths = [words.pop(word) for word in LENGTH_WORDS if word in words]
        drawn = words.pop("do_sample", None)
        temperature = float(words.pop("temperature", 0.0 if not drawn else 1.0))
        kinds = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
        known = {key: kind(words.pop(key)) for key, kind in kinds.items() if key in words}
        if known.get("top_k") == 0:  # other tools' word for all tokens
            known["top_k"] = None
        unknown = {key: value for key, value in words.items() if NEUTRAL.get(key) != value}
        if unknown:
            raise UserError(
                f"a task asks for {unknown} when the model writes, which is not done here. "
                f"leave it out with --gen_kwargs {next(iter(unknown))}=None, or leave the task out."
            )
        sampling = Sampling(
            max_new_tokens=int(lengths[0]) if lengths else MAX_NEW_TOKENS,
            temperature=0.0 if drawn is False else temperature,
            stop=list(dict.fromkeys(stop for stop in (*stops, eos) if stop)),
            **{"top_k": None, **known},
        )
        if sampling.max_new_tokens >= self.loaded.limit:
            raise UserError(
                f"a task lets the model write {sampling.max_new_tokens:,} tokens, and its context "
                f"has {self.loaded.limit:,} in all. "
                f"Give fewer: --gen_kwargs max_gen_toks={max(1, self.loaded.limit // 2)}"
            )
        return sampling

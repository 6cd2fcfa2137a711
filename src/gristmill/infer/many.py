"""Many texts written at once by one model: rows of a batch, each with its own text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from gristmill.config.use_commands import Sampling
from gristmill.infer.load import LoadedModel, TextDecoder
from gristmill.models.batching import generate_batch
from gristmill.models.decoding import check_prompt, check_sampling
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

ROWS_CPU, ROWS_GPU = 8, 32


@dataclass(frozen=True)
class Ending:
    """The end of a text: its tokens, and "eos", "stop", "max_new_tokens" or "context"."""

    num_tokens: int
    stop: str


@dataclass(frozen=True)
class Task:
    """A text to be written: the ids that it follows, and the seed of its choices.

    `goes_on` tells a continuation of the text of `ids` from a text of its own, as a chat's reply.
    """

    ids: Sequence[int]
    seed: int
    goes_on: bool = True


def check_batch_size(batch_size: int | str) -> None:
    """Raise UserError for fewer than one text at a time."""
    if isinstance(batch_size, int) and batch_size < 1:
        raise UserError(
            f"no text can be written at a time (batch_size {batch_size}). give 1 or more, or auto.",
            {"--batch_size": "auto"},
        )


def choose_rows(batch_size: int | str, num_texts: int, device: torch.device) -> int:
    """How many texts are written at once."""
    check_batch_size(batch_size)
    wanted = ROWS_CPU if device.type == "cpu" else ROWS_GPU
    return max(1, min(wanted if isinstance(batch_size, str) else batch_size, num_texts))


def write_texts(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    rows: int,
    stop_ids: Collection[int] | None = None,
) -> Iterator[tuple[int, str | Ending]]:
    """(number of the task, piece of its text) as they come, and (number, Ending) at the end of it.

    A text does not depend on those beside it, but for the rounding of what is computed together.
    Raises UserError for a prompt that is empty or leaves no room, before anything is written.
    """
    for number, task in enumerate(tasks):
        try:
            check_prompt(task.ids, loaded.limit)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
    s = sampling
    check_sampling(s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty)
    return _write(loaded, tasks, sampling, rows, stop_ids)


def _write(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    sampling: Sampling,
    rows: int,
    stop_ids: Collection[int] | None,
) -> Iterator[tuple[int, str | Ending]]:
    if not tasks:
        return
    longest = max(len(task.ids) for task in tasks) + sampling.max_new_tokens
    batch = loaded.batch(rows, longest)
    ended: set[int] = set()
    events = generate_batch(
        batch,
        [task.ids for task in tasks],
        sampling,
        eos_ids=frozenset(loaded.tokenizer.stop_ids if stop_ids is None else stop_ids),
        generators=(loaded.generator(task.seed) for task in tasks),
        stopped=ended,
    )
    writing: dict[int, _Writing] = {}
    for number, event in events:
        if number not in writing:
            writing[number] = _Writing(loaded.tokenizer, tasks[number], sampling.stops)
        text = writing[number]
        if isinstance(event, int):
            text.num_tokens += 1
            piece = text.decoder.put(event)
            if text.decoder.stopped:
                ended.add(number)
        else:
            piece = text.decoder.flush()
        if piece:
            yield number, piece
        if isinstance(event, str):
            del writing[number]
            yield number, Ending(text.num_tokens, "stop" if text.decoder.stopped else event)


class _Writing:
    """A text under way."""

    def __init__(self, tokenizer: Tokenizer, task: Task, stops: Sequence[str]) -> None:
        self.decoder = TextDecoder(tokenizer, task.ids if task.goes_on else (), stops)
        self.num_tokens = 0

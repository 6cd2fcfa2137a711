"""Many texts written at once by one model: rows of a batch, each with its own text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from gristmill.config.use_commands import Compile, Sampling
from gristmill.infer.load import LoadedModel, TextDecoder, check_options
from gristmill.models.batching import Batch, generate_batch
from gristmill.models.decoding import check_prompt
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

    `goes_on` tells a continuation of the text of `ids` from a text of its own, as a chat's reply;
    `stop_ids` end it (unset: the tokenizer's).
    """

    ids: Sequence[int]
    seed: int
    goes_on: bool = True
    stop_ids: frozenset[int] | None = None


def check_batch_size(batch_size: int | str) -> None:
    """Raise UserError for fewer than one text at a time."""
    if isinstance(batch_size, int) and batch_size < 1:
        raise UserError(
            f"no text can be written at a time (batch_size {batch_size}). give 1 or more, or auto.",
            {"--batch_size": "auto"},
        )


def choose_rows(
    loaded: LoadedModel, batch_size: int | str, tasks: Collection[Task], sampling: Sampling
) -> int:
    """How many texts are written at once: as told, or as many as pay and fit into the memory."""
    check_batch_size(batch_size)
    rows = batch_size
    if isinstance(rows, str):
        fit = loaded.cached_rows(_longest(loaded, tasks, sampling))
        rows = min(ROWS_CPU if loaded.device.type == "cpu" else ROWS_GPU, fit)
    return max(1, min(rows, len(tasks)))


def _longest(loaded: LoadedModel, tasks: Collection[Task], sampling: Sampling) -> int:
    """Tokens of the longest text with its prompt."""
    longest = max((len(task.ids) for task in tasks), default=0) + sampling.max_new_tokens
    return min(longest, loaded.limit)


def write_texts(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    rows: int,
    compiled: Compile = "off",
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
    check_options(sampling)
    if not tasks:
        return iter(())
    batch = loaded.batch(rows, _longest(loaded, tasks, sampling), compiled=compiled)
    return _write(loaded, batch, tasks, sampling)


def _write(
    loaded: LoadedModel, batch: Batch, tasks: Sequence[Task], sampling: Sampling
) -> Iterator[tuple[int, str | Ending]]:
    own = frozenset(loaded.tokenizer.stop_ids)
    stop_ids = [own if task.stop_ids is None else task.stop_ids for task in tasks]
    ended: set[int] = set()
    events = generate_batch(
        batch,
        [task.ids for task in tasks],
        sampling,
        # The others end some texts only.
        eos_ids=frozenset.intersection(*stop_ids),
        generators=(loaded.generator(task.seed) for task in tasks),
        stopped=ended,
    )
    writing: dict[int, _Writing] = {}
    for number, event in events:
        if number not in writing:
            writing[number] = _Writing(loaded.tokenizer, tasks[number], sampling.stops)
        text = writing[number]
        if isinstance(event, str):
            piece = text.decoder.flush()
        elif event in stop_ids[number]:
            text.has_eos, piece = True, ""
            ended.add(number)
        else:
            text.num_tokens += 1
            piece = text.decoder.put(event)
            if text.decoder.stopped:
                ended.add(number)
        if piece:
            yield number, piece
        if isinstance(event, str):
            del writing[number]
            yield number, Ending(text.num_tokens, text.why(event))


class _Writing:
    """A text under way."""

    def __init__(self, tokenizer: Tokenizer, task: Task, stops: Sequence[str]) -> None:
        self.decoder = TextDecoder(tokenizer, task.ids if task.goes_on else (), stops)
        self.num_tokens = 0
        self.has_eos = False

    def why(self, event: str) -> str:
        """What ended the text, of which the batch knows only a part."""
        if self.decoder.stopped:
            return "stop"
        return "eos" if self.has_eos else event

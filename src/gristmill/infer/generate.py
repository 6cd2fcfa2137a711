"""The `generate` command: continue a prompt, or many."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from gristmill.config.use_commands import Generate
from gristmill.formats.model_dir import open_model_dir
from gristmill.infer.conversation import chat_ids, check_system, reply_stop_ids, require_template
from gristmill.infer.load import (
    LoadedModel,
    check_options,
    cut_short,
    emit,
    load_for_command,
    memory,
    note,
    speed,
    visible,
)
from gristmill.infer.many import Ending, Task, check_batch_size, choose_rows, write_texts
from gristmill.infer.prompts import Prompt, read_prompts
from gristmill.infer.results import Place, ResultFile, to_line
from gristmill.models.decoding import Context, check_prompt, generate_tokens
from gristmill.util.errors import UserError

__all__ = ["generate", "generate_tokens"]

STDOUT = "-"
OWN_FIELDS = ("completion", "sample", "seed", "prompt_tokens", "tokens", "stop")
"""What a record has beside the fields of its prompt."""

PROGRESS_S = 5.0

Text = tuple[Place, str, Ending]
"""A finished text: what it is, its words, and how it ended."""


def generate(cfg: Generate) -> None:
    """Write `num_samples` texts for each prompt, each ended by a line break, or as JSON lines.

    The texts are on stdout or in the file of `output`. Everything else is on stderr, the prompt
    included, so that a terminal shows the whole text, as does a log of both, and a pipe gets the
    continuation alone. Sample i is drawn with seed + i.
    """
    _check(cfg)
    prompts = read_prompts(cfg.prompt, cfg.prompt_file)
    _check_fields(cfg, prompts)
    _check_special(cfg, prompts)
    with _destination(cfg, prompts) as file:
        loaded = load_for_command(cfg)
        tasks = _tasks(loaded, cfg, prompts)
        if _is_streamed(cfg, prompts):
            _stream_each(loaded, cfg, prompts[0], tasks)
        else:
            _write_all(loaded, cfg, prompts, tasks, file)
    note(memory(loaded.device))


def _check(cfg: Generate) -> None:
    check_options(cfg)
    if cfg.num_samples < 1:
        raise UserError(f"nothing to generate (num_samples {cfg.num_samples}). give 1 or more.")
    check_batch_size(cfg.batch_size)
    if cfg.overwrite and cfg.output in (None, STDOUT):
        raise UserError("--overwrite true replaces the file of --output, which is not given.")


def _check_fields(cfg: Generate, prompts: Sequence[Prompt]) -> None:
    if cfg.output is None:
        return
    for prompt in prompts:
        if taken := [name for name in OWN_FIELDS if name in prompt.fields]:
            raise UserError(
                f"{prompt.place} has a field that the results have too ({', '.join(taken)}). "
                "rename it."
            )


def _check_special(cfg: Generate, prompts: Sequence[Prompt]) -> None:
    """Refuse special tokens in what is said in a chat: there, the template alone writes them."""
    chats = (prompt.place for prompt in prompts if _is_chat(cfg, prompt))
    if cfg.special_tokens and (place := next(chats, None)) is not None:
        raise UserError(
            f"--special_tokens true reads them in a text that is continued, and {place} is put "
            "into the chat template, whose tokens nobody else may write. leave it out.",
            {"--special_tokens": None},
        )


def _is_chat(cfg: Generate, prompt: Prompt) -> bool:
    """Whether the prompt is a question, put into the model's chat template."""
    return bool(prompt.messages) or cfg.chat or cfg.system is not None


def _is_streamed(cfg: Generate, prompts: Sequence[Prompt]) -> bool:
    """Whether one text comes after the other, shown as it is written."""
    return len(prompts) == 1 and cfg.output is None and cfg.batch_size in (1, "auto")


def _destination(
    cfg: Generate, prompts: Sequence[Prompt]
) -> AbstractContextManager[ResultFile | None]:
    """The file of `output`, opened before the model is read, because it may not be possible."""
    if cfg.output in (None, STDOUT):
        return nullcontext()
    job = dataclasses.asdict(cfg)
    for name in ("output", "overwrite", "prompt_file", "batch_size", "device", "compile"):
        del job[name]
    job["checkpoint_dir"] = os.path.abspath(cfg.checkpoint_dir or "")
    job["weights"] = _weights(cfg.checkpoint_dir)
    job["prompts"] = [prompt.fields for prompt in prompts]
    assert cfg.output is not None
    return ResultFile(cfg.output, job, overwrite=cfg.overwrite)


def _weights(checkpoint_dir: str | None) -> list[tuple[str, int, int]]:
    """The files of the weights with their sizes and times: a run has others when it has gone on.

    Texts of both in one file would pass for one model's.
    """
    found: list[tuple[str, int, int]] = []
    source = None if checkpoint_dir is None else open_model_dir(checkpoint_dir)
    while source is not None:
        tensors = source.open_tensors()
        for file in sorted({tensors.file_of(name) for name in tensors}):
            state = file.stat()
            found.append((os.path.abspath(file), state.st_size, state.st_mtime_ns))
        source = source.base
    return found


def _tasks(loaded: LoadedModel, cfg: Generate, prompts: Sequence[Prompt]) -> dict[Place, Task]:
    """What is to be written, by the number of the prompt and of the sample."""
    if cfg.system is not None:
        check_system(loaded, cfg.system)
    elif cfg.chat:
        require_template(loaded, "--chat true")
    tasks = {}
    plain_specials: set[str] = set()
    has_chats = any(_is_chat(cfg, prompt) for prompt in prompts)
    reply_ends = reply_stop_ids(loaded) if has_chats else None
    for index, prompt in enumerate(prompts):
        as_chat = _is_chat(cfg, prompt)
        try:
            ids = _prompt_ids(loaded, cfg, prompt, as_chat)
            check_prompt(ids, loaded.limit)
        except UserError as error:
            raise UserError(
                f"{prompt.place}: {error}" if len(prompts) > 1 else str(error)
            ) from error
        if not as_chat and not cfg.special_tokens:
            plain_specials |= {t for t in loaded.tokenizer.special_tokens if t in prompt.text}
        for sample in range(cfg.num_samples):
            seed, ends = cfg.seed + sample, reply_ends if as_chat else None
            tasks[index, sample] = Task(ids, seed, goes_on=not as_chat, stop_ids=ends)
    if plain_specials:
        note(
            f"{', '.join(sorted(plain_specials))} in a prompt is plain text; --special_tokens true "
            "reads it as the token, and --chat true puts the prompt into the chat template."
        )
    return tasks


def _prompt_ids(loaded: LoadedModel, cfg: Generate, prompt: Prompt, as_chat: bool) -> list[int]:
    if as_chat:
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        if cfg.system is not None:
            if messages[0]["role"] == "system":
                raise UserError("--system is given, and the messages have a system prompt already.")
            messages = ({"role": "system", "content": cfg.system}, *messages)
        return chat_ids(loaded, messages)
    return loaded.prompt_ids(prompt.text, special=cfg.special_tokens)


def _stream_each(
    loaded: LoadedModel, cfg: Generate, prompt: Prompt, tasks: dict[Place, Task]
) -> None:
    """One text after the other, shown as it is written."""
    context = loaded.context(compiled=cfg.compile)
    for index, task in enumerate(tasks.values()):
        if cfg.num_samples > 1:
            note(f"Sample {index + 1} of {cfg.num_samples} (seed {task.seed}):")
        _stream(loaded, context, cfg, prompt, task)


def _stream(
    loaded: LoadedModel,
    context: Context,
    cfg: Generate,
    prompt: Prompt,
    task: Task,
) -> None:
    generator = loaded.generator(task.seed)
    stream = loaded.stream(
        task.ids, cfg, stop_ids=task.stop_ids, generator=generator, context=context
    )
    _show_prompt(prompt, task)
    try:
        after = task.ids if task.goes_on else ()
        for piece in loaded.text(stream, after=after, stops=cfg.stops):
            emit(piece)
    finally:
        # Ctrl-C ends the command (exit code 130) with what was written so far.
        emit("\n")
        if (reason := cut_short(stream, loaded.limit)) and stream.stop == "context":
            note(reason)
        note(speed(stream))


def _show_prompt(prompt: Prompt, task: Task) -> None:
    """The prompt on stderr; where stdout goes to the same place, its continuation follows it."""
    said = str(prompt.messages[-1]["content"] if prompt.messages else prompt.text)
    shown = visible(said) if sys.stderr.isatty() else said
    sys.stderr.write(shown if task.goes_on and _is_one_stream() else shown + "\n")
    sys.stderr.flush()


def _is_one_stream() -> bool:
    """Whether stdout and stderr are one terminal, file or pipe (`> log 2>&1`)."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):  # replaced by something that is no file
        return False


def _write_all(
    loaded: LoadedModel,
    cfg: Generate,
    prompts: Sequence[Prompt],
    tasks: dict[Place, Task],
    file: ResultFile | None,
) -> None:
    """All texts, several at a time; shown in the order of the prompts."""
    done = set() if file is None else file.done
    places = [place for place in tasks if place not in done]
    if done:
        note(f"{len(done):,} texts are there already; going on with the others.")
    chosen = [tasks[place] for place in places]
    rows = choose_rows(loaded, cfg.batch_size, chosen, cfg)
    note(f"Writing {_texts(len(places))}, {rows} at a time.")
    events = write_texts(loaded, chosen, cfg, rows=rows, compiled=cfg.compile)
    meter = _Meter(len(places), live=file is not None)
    finished = meter.counted(_finished(events, places))
    try:
        for place, text, ending in finished if file else _in_order(finished, places):
            prompt, task = prompts[place[0]], tasks[place]
            if cfg.output is None:
                _show_prompt(prompt, task)
                emit(text + "\n")
                continue
            record = _record(prompt, place, task, text, ending)
            if file is None:
                emit(to_line(record))
            else:
                file.add(place, record)
    finally:
        note(meter.summary())
        if file is not None and len(file.done) < len(tasks):
            note(
                f"{len(file.done):,} of {len(tasks):,} texts are kept in {file.partial}; the same "
                "command goes on from there."
            )
    if file is not None:
        note(f"Texts: {file.path}")


def _texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count:,} texts"


def _finished(
    events: Iterable[tuple[int, str | Ending]], places: Sequence[Place]
) -> Iterator[Text]:
    """The texts as they end."""
    pieces: dict[int, list[str]] = {}
    for number, event in events:
        if isinstance(event, str):
            pieces.setdefault(number, []).append(event)
        else:
            yield places[number], "".join(pieces.pop(number, [])), event


def _in_order(texts: Iterable[Text], places: Sequence[Place]) -> Iterator[Text]:
    """The texts in the order of their places; each waits for those before it."""
    waiting: dict[Place, Text] = {}
    due = iter(places)
    place = next(due, None)
    for text in texts:
        waiting[text[0]] = text
        while place in waiting:
            yield waiting.pop(place)
            place = next(due, None)


def _record(
    prompt: Prompt, place: Place, task: Task, text: str, ending: Ending
) -> dict[str, object]:
    """A text with all that is known of it."""
    own = (text, place[1], task.seed, len(task.ids), ending.num_tokens, ending.stop)
    return prompt.fields | dict(zip(OWN_FIELDS, own, strict=True))


class _Meter:
    """How many texts and tokens there are, told now and then where nothing else is shown."""

    def __init__(self, num_texts: int, *, live: bool) -> None:
        self._num_texts, self._live = num_texts, live
        self._texts = self._tokens = 0
        self._started = self._told = time.perf_counter()

    def counted(self, texts: Iterable[Text]) -> Iterator[Text]:
        """The same texts, counted."""
        for text in texts:
            self._texts += 1
            self._tokens += text[2].num_tokens
            now = time.perf_counter()
            if self._live and now - self._told >= PROGRESS_S:
                self._told = now
                rate = self._tokens / (now - self._started)
                note(f"{self._texts:,} of {self._num_texts:,} texts, {rate:,.1f} tokens/sec")
            yield text

    def summary(self) -> str:
        """The line that says how long the texts took that were finished."""
        total = time.perf_counter() - self._started
        rate = self._tokens / total if total else 0.0
        return (
            f"Time for inference: {total:.2f} sec total, {rate:.2f} tokens/sec, "
            f"{self._tokens} tokens in {_texts(self._texts)}"
        )

"""The `chat` command: talk with a model, turn by turn."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from gristmill.config.use_commands import Chat
from gristmill.infer.conversation import Conversation
from gristmill.infer.load import (
    LoadedModel,
    check_options,
    cut_short,
    emit,
    load_for_command,
    note,
    speed,
)
from gristmill.models.decoding import Context
from gristmill.util.errors import UserError
from gristmill.util.paths import user_state_dir

LEAVE = ("!quit", "!exit")
FORGET = "!clear"
ENDS_OF_LINES = (".", "!submit")
HISTORY_LINES = 1000


def chat(cfg: Chat) -> None:
    """Read prompts and stream replies until an empty prompt, `!quit`, `!exit` or the input's end.

    The conversation is on stdout, speed and remarks on stderr. Ctrl-C during a reply stops the
    reply; at the prompt it leaves. `!clear` begins a new conversation. Prompts may also come
    through a pipe, one a line.
    """
    check_options(cfg)
    loaded = load_for_command(cfg)
    conversation = Conversation(loaded, cfg.system, room=cfg.max_new_tokens)
    if not conversation.has_template:
        note(
            "This model has no chat template: it continues each prompt as it stands and "
            "remembers no earlier one."
        )
    if (remark := loaded.template_note()) is not None:
        note(remark)
    context = loaded.context(compiled=cfg.compile)
    emit(f"Now chatting with {loaded.name}.\n{_how_to_leave(cfg.multiline)}\n")
    with _line_editing(keep=cfg.history):
        _talk(loaded, conversation, context, cfg)


def _talk(loaded: LoadedModel, conversation: Conversation, context: Context, cfg: Chat) -> None:
    generator = loaded.generator(cfg.seed)
    while (prompt := read_prompt(cfg.multiline)) is not None:
        if prompt.strip() == FORGET:
            conversation.clear()
            note("Forgotten; a new conversation begins.")
            continue
        try:
            ids, forgotten = conversation.ask(prompt)
        except UserError as error:
            note(f"error: {error}")
            continue
        if forgotten:
            note(
                f"The context is full ({loaded.limit} tokens): the oldest "
                f"{'turn was' if forgotten == 1 else f'{forgotten} turns were'} forgotten."
            )
        _reply(loaded, conversation, context, cfg, ids, generator)


def read_prompt(multiline: bool) -> str | None:
    """The next prompt; None when the user leaves."""
    lines: list[str] = []
    emit("\n")
    while True:
        try:
            line = _read_line("" if lines else ">> Prompt: ")
        except KeyboardInterrupt:
            emit("\n")
            return None
        except EOFError:
            # The end of the input also ends a prompt of several lines that is under way.
            emit("\n")
            return "\n".join(lines) or None
        if not lines and (not line.strip() or line.strip() in LEAVE):
            return None
        if not multiline:
            return line
        if line.strip() in ENDS_OF_LINES:
            return "\n".join(lines) or None
        lines.append(line)


def _read_line(prompt: str) -> str:
    """One line without its end; EOFError when there is none, UserError when it is no text."""
    try:
        if sys.stdin.isatty():
            return input(prompt)
        emit(prompt)
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        emit("\n")
        raise UserError(
            f"the input is not {error.encoding.upper()} (byte {error.start} of what was read). "
            "convert it, for example with iconv."
        ) from None
    if not line:
        raise EOFError
    emit(line if line.endswith("\n") else line + "\n")
    return line.rstrip("\r\n")


def _reply(
    loaded: LoadedModel,
    conversation: Conversation,
    context: Context,
    cfg: Chat,
    ids: list[int],
    generator: torch.Generator,
) -> None:
    """Stream one reply and remember it."""
    stream = loaded.stream(
        ids, cfg, stop_ids=conversation.stop_ids, generator=generator, context=context
    )
    pieces: list[str] = []
    emit(">> Reply: ")
    try:
        # A reply behind a template starts a text of its own; a continuation goes on with one.
        after = () if conversation.has_template else ids
        for piece in loaded.text(stream, after=after, stops=cfg.stops):
            pieces.append(piece)
            emit(piece)
    except KeyboardInterrupt:
        stream.stop = "interrupt"
    emit("\n")
    conversation.answered("".join(pieces))
    if reason := cut_short(stream, loaded.limit):
        note(reason)
    note(speed(stream))


def _how_to_leave(multiline: bool) -> str:
    if multiline:
        return (
            f"A prompt ends with a line that holds only '{ENDS_OF_LINES[0]}'.\n"
            "To exit, press 'Enter' on an empty prompt."
        )
    return "To exit, press 'Enter' on an empty prompt."


@contextlib.contextmanager
def _line_editing(*, keep: bool) -> Iterator[None]:
    """Arrow keys while a terminal is read; with `keep`, over the prompts of earlier chats too."""
    readline: ModuleType | None = None
    if sys.stdin.isatty():
        # Importing is what makes `input` edit lines.
        with contextlib.suppress(ImportError):
            import readline
    if readline is None or not keep:
        yield
        return
    file = user_state_dir() / "chat_history"
    # The convenience may not stop a chat: a home without room or rights has no history.
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    known = readline.get_current_history_length()
    try:
        yield
    finally:
        new = readline.get_current_history_length() - known
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # Prompts are nobody else's business.
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.set_history_length(HISTORY_LINES)
            readline.append_history_file(new, file)

"""The command line: a table of commands, each imported only when it runs; exit codes; no logic."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill import __version__
from gristmill.config import scripts
from gristmill.util.errors import Interrupted, RunError, UserError


@dataclass(frozen=True)
class Command:
    """Where a command's options and its function are, and what a bare call prints."""

    config: str
    run: str
    summary: str
    positionals: tuple[str, ...] = ()
    listing: str | None = None
    details: str | None = None
    """What `list --verbose` prints."""


# `+` appends to a list: as many words as there are go into one option.
_MOST_WORDS = 10_000
MANY_PATHS = ("data_path+",) * _MOST_WORDS
MANY_INPUTS = ("input_dir+",) * _MOST_WORDS

SPELLINGS = {
    "finetune_full": "finetune full",
    "finetune_lora": "finetune lora",
    "finetune_adapter": "finetune adapter",
    "finetune_adapter_v2": "finetune adapter_v2",
    "merge_lora": "merge",
}
"""Names of commands in another tool, and ours."""

ELSEWHERE = {
    "finetune adapter_v2": "adapter_v2 (a scale and a bias on every matrix, and the norms) is not "
    "there. Use `gristmill finetune lora` with the same options; `--lora_key true "
    "--lora_projection true --lora_mlp true` trains all matrices of the blocks, and the result is "
    "an ordinary model. The first version is `gristmill finetune adapter`.",
}
"""Commands of another tool that have no like here, and what to do instead."""

VERBOSE = ("--verbose", "--verbose true", "-v")

COMMANDS = {
    "quickstart": Command(
        "gristmill.config.commands:Quickstart",
        "gristmill.quickstart:quickstart",
        "real text that is on every machine to a small model, in minutes",
    ),
    "download": Command(
        "gristmill.config.commands:Download",
        "gristmill.formats.download:download",
        "fetch a model, a tokenizer or a corpus; goes on where it was cut",
        ("repo_id",),
        "gristmill.models.zoo:repositories",
    ),
    "tokenizer train": Command(
        "gristmill.config.commands:TokenizerTrain",
        "gristmill.data.tokenizer_command:main",
        "train a byte-level BPE tokenizer on raw text",
        ("input_dir",),
    ),
    "prepare": Command(
        "gristmill.config.commands:Prepare",
        "gristmill.data.prepare:prepare",
        "raw text to a dataset, resumable; `prepare status OUT` shows how far it is",
        ("layout", "output_dir"),
        "gristmill.data.raw.layouts:names",
    ),
    "data stats": Command(
        "gristmill.config.data_commands:DataStats",
        "gristmill.data.look.stats:run",
        "what datasets hold: tokens, documents and their lengths, epochs of a run",
        MANY_PATHS,
    ),
    "data inspect": Command(
        "gristmill.config.data_commands:DataInspect",
        "gristmill.data.look.inspect:run",
        "a document, a sample or the batch of a training step, as text",
        ("data_path",),
    ),
    "data verify": Command(
        "gristmill.config.data_commands:DataVerify",
        "gristmill.data.store.verify:run",
        "check every chunk against its digest and the manifest",
        MANY_PATHS,
    ),
    "data estimate": Command(
        "gristmill.config.data_commands:DataEstimate",
        "gristmill.data.look.estimate:run",
        "tokens, size and time of a preparation, from a small sample",
        ("layout", "input_dir"),
    ),
    "data import": Command(
        "gristmill.config.data_commands:DataImport",
        "gristmill.data.store.adopt:run",
        "adopt litdata datasets where they are, and packed files as copies",
        MANY_INPUTS,
    ),
    "pretrain": Command(
        "gristmill.config.commands:Pretrain",
        "gristmill.launch.start:train",
        "train a model, from scratch or continued, resumable",
        ("model_name",),
        "gristmill.models.zoo:names",
        "gristmill.models.zoo.listing:table",
    ),
    "finetune full": Command(
        "gristmill.config.finetune:FinetuneFull",
        "gristmill.launch.start:train",
        "train all weights of a model on instructions or chats, resumable",
        ("checkpoint_dir",),
    ),
    "finetune lora": Command(
        "gristmill.config.finetune:FinetuneLora",
        "gristmill.launch.start:train",
        "train a low-rank addition (LoRA, DoRA) on instructions or chats, resumable",
        ("checkpoint_dir",),
    ),
    "finetune adapter": Command(
        "gristmill.config.finetune:FinetuneAdapter",
        "gristmill.launch.start:train",
        "train prefixes of the attention on instructions or chats, resumable",
        ("checkpoint_dir",),
    ),
    "merge": Command(
        "gristmill.config.finetune:Merge",
        "gristmill.finetune.merge:merge",
        "an adapter and its base as one ordinary model",
        ("checkpoint_dir", "output_dir"),
    ),
    "generate": Command(
        "gristmill.config.use_commands:Generate",
        "gristmill.infer.generate:generate",
        "continue a prompt, or many",
        ("checkpoint_dir", "prompt"),
    ),
    "chat": Command(
        "gristmill.config.use_commands:Chat",
        "gristmill.infer.chat:chat",
        "talk with a model",
        ("checkpoint_dir",),
    ),
    "evaluate": Command(
        "gristmill.config.evaluate:Evaluate",
        "gristmill.measure.command:evaluate",
        "measure a model on tasks of lm-evaluation-harness",
        ("checkpoint_dir",),
        "gristmill.measure.tasks:names",
    ),
    "serve": Command(
        "gristmill.config.serve:Serve",
        "gristmill.infer.serve.command:serve",
        "a model behind the OpenAI API, for one person or a small team",
        ("checkpoint_dir",),
    ),
    "inspect": Command(
        "gristmill.config.commands:Inspect",
        "gristmill.infer.inspect:inspect",
        "what a model, checkpoint or run is, whether it is whole, and what to do with it",
        ("path",),
    ),
    "export": Command(
        "gristmill.config.commands:Export",
        "gristmill.formats.export:export",
        "a model of any kind for other tools: Hugging Face, LitGPT, GGUF",
        ("checkpoint_dir", "output_dir"),
    ),
    "convert_to_litgpt": Command(
        "gristmill.config.commands:ConvertToLitgpt",
        "gristmill.formats.export:convert_to_litgpt",
        "LitGPT's files beside those of a model, as LitGPT's command does",
        ("checkpoint_dir",),
    ),
    "convert_from_litgpt": Command(
        "gristmill.config.commands:Convert",
        "gristmill.formats.export:convert_from_litgpt",
        "`export --format hf`, as LitGPT calls it",
        ("checkpoint_dir", "output_dir"),
    ),
    "convert_pretrained_checkpoint": Command(
        "gristmill.config.commands:Convert",
        "gristmill.formats.export:convert_pretrained_checkpoint",
        "`export --format litgpt`, as LitGPT calls it after a training",
        ("checkpoint_dir", "output_dir"),
    ),
    "consolidate_checkpoint": Command(
        "gristmill.config.script_commands:Consolidate",
        "gristmill.formats.consolidate:consolidate",
        "another tool's checkpoint in pieces as one file; ours need none",
        ("checkpoint_folder", "output_file"),
    ),
    "merge_files": Command(
        "gristmill.config.script_commands:MergeFiles",
        "gristmill.data.store.merge:merge",
        "the folders of a cluster's nodes as one dataset, linked; ours need none",
        ("source_dir", "target_dir"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 failure, 2 mistake, 128 + signal."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # What the output's encoding does not have is shown as its number, as on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = _meant([word for word in words if word != "--debug"])
    try:
        code = _dispatch(words)
        _settle()
        return code
    except UserError as error:
        if debug:
            raise
        _print_error(str(error))
        if error.fix:
            print(f"Try:\n  {corrected(words, error.fix)}", file=sys.stderr)
        return 2
    except RunError as error:
        if debug:
            raise
        _print_error(str(error))
        return 1
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`gristmill pretrain list | head`); not a failure.
        _settle()
        return 0
    except Exception as error:
        if debug:
            raise
        _print_error(
            f"{type(error).__name__}: {error}. This is a failure inside gristmill or your "
            "machine; run again with --debug for where it happened."
        )
        return 1


def _meant(words: list[str]) -> list[str]:
    """The words of a command of ours that another tool's script stands for, which is said."""
    meant = scripts.translate(words)
    if meant[1:] != words[1:]:
        print(f"{words[0]} is here: {_shown(['gristmill', *meant])}", file=sys.stderr)
    return meant


def _settle() -> None:
    """Leave nothing for Python to write when it ends: where the reader has left, it would fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def corrected(words: Sequence[str], fix: dict[str, object]) -> str:
    """The command with the options of `fix` put in (None: taken out)."""
    kept: list[str] = []
    skip = False
    for i, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in fix:
            skip = not equals and i + 1 < len(words) and not words[i + 1].startswith("--")
        else:
            kept.append(word)
    added = [
        part for name, value in fix.items() if value is not None for part in (name, str(value))
    ]
    return _shown(["gristmill", *kept, *added])


def _shown(words: Sequence[str]) -> str:
    """The words as a shell takes them, keys left out: what is printed is logged and passed on."""
    from gristmill.config.parse import SECRETS

    shown: list[str] = []
    is_key = False
    for word in words:
        name, equals, _ = word.partition("=")
        if is_key:
            shown.append("…")
        elif equals and name in SECRETS:
            shown.append(f"{name}=…")
        else:
            shown.append(shlex.quote(word))
        is_key = not is_key and word in SECRETS
    return " ".join(shown)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"gristmill {__version__}")
        return 0
    if len(words) == 1 or words[1] in ("-h", "--help", "help", "list"):
        group = {name: c for name, c in COMMANDS.items() if name.startswith(words[0] + " ")}
        if group and words[0] not in COMMANDS:
            print(_table(group))
            return 0
    name, rest = _command_name(words)
    command = COMMANDS[name]
    listing = _listing(command, rest)
    if listing is not None:
        print("\n".join(_load(listing)()))
        if not rest and sys.stdout.isatty():
            sys.stdout.flush()
            print(f"Names that it knows; for more: gristmill {name} --help", file=sys.stderr)
        return 0
    from gristmill.config.parse import parse

    config = parse(
        _load(command.config), rest, prog=f"gristmill {name}", positionals=command.positionals
    )
    # How long a thread spins at a barrier before it sleeps. OpenMP's default suits a machine of its
    # own; on one that does anything else, threads wait for each other's time slices. This is long
    # enough for the short gaps of a training step (docs/design.md has the measurements). Read once,
    # when torch loads the library.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    _load(command.run)(config)
    return 0


def _listing(command: Command, rest: list[str]) -> str | None:
    """Where the lines are that a bare call, `list` or `list --verbose` prints; None for others."""
    if not rest or rest == ["list"]:
        return command.listing
    if rest[0] == "list" and " ".join(rest[1:]).replace("=", " ").lower() in VERBOSE:
        return command.details
    return None


def _command_name(words: list[str]) -> tuple[str, list[str]]:
    words = [*SPELLINGS.get(words[0], words[0]).split(" "), *words[1:]]
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    given = " ".join(words[:2])
    if given in ELSEWHERE:
        raise UserError(ELSEWHERE[given])
    group = [name for name in COMMANDS if name.startswith(words[0] + " ")]
    if group:
        near = difflib.get_close_matches(given, group, n=1, cutoff=0.7)
        hint = f"Did you mean {near[0]}?" if near else f"Choose {', '.join(group)}."
        raise UserError(f"unknown command {given!r}. {hint}")
    known = [*COMMANDS, *scripts.SCRIPTS]
    near = difflib.get_close_matches(words[0], known, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`gristmill --help` lists them."
    raise UserError(f"unknown command {words[0]!r}. {hint}")


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _overview() -> str:
    return "\n".join(
        [
            f"gristmill {__version__}: raw text to a language model, one command per stage.",
            "",
            _table(COMMANDS),
            "",
            "Scripts of other tools' tutorials, by their names and with their options:",
            f"  {', '.join(scripts.SCRIPTS)}",
            "",
            "`gristmill COMMAND --help` lists a command's options; --debug shows tracebacks.",
        ]
    )


def _table(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in commands.items())


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)

"""Pages of commands and their options, from the dataclasses that the command line is made of."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from gristmill.cli import COMMANDS, SPELLINGS, Command
from gristmill.config.data import DataModule
from gristmill.config.explain import subclasses
from gristmill.config.model import ModelConfig
from gristmill.config.parse import ALIASES, FOREIGN_SETTINGS, usage
from gristmill.config.scripts import SCRIPTS, Script

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Any: "any value",
}
MODEL_FIELDS = "model-config"
"""The page of all fields of a model's configuration, which several commands take as a section."""


GUIDES = {
    "quickstart": "quickstart",
    "download": "how-to/models",
    "tokenizer": "how-to/tokenizer",
    "prepare": "how-to/prepare",
    "data": "data",
    "pretrain": "how-to/pretrain",
    "finetune": "how-to/finetune",
    "merge": "how-to/finetune",
    "generate": "how-to/generate-and-chat",
    "chat": "how-to/generate-and-chat",
    "evaluate": "how-to/evaluate",
    "serve": "how-to/serve",
    "inspect": "how-to/models",
    "export": "how-to/models",
}
"""First word of a command and the page that shows it in use."""


@dataclass(frozen=True)
class Option:
    """One option as a person meets it."""

    name: str
    takes: str
    default: str
    text: str


def escape(text: str) -> str:
    """Help text as Markdown: options as code, signs of Markdown as themselves."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for i in range(0, len(parts), 2):
        plain = parts[i].replace("<", "&lt;")
        plain = re.sub(r"([*_\[\]|\\])", r"\\\1", plain)
        parts[i] = re.sub(r"(?<![\w`])(--[a-z][\w.\\]*\w)", _code, plain)
    return "".join(parts)


def _code(match: re.Match[str]) -> str:
    return f"`{match[1]}`".replace("\\", "")


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """The help text of every field, inherited ones too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for parameter in docstring_parser.parse_from_object(base).params:
            if parameter.description:
                found[parameter.arg_name] = parameter.description
    return found


def takes(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        members = [part for part in get_args(kind) if part is not type(None)]
        return " or ".join(dict.fromkeys(takes(part) for part in members))
    if get_origin(kind) is list:
        return f"a list ({takes(get_args(kind)[0])} each)"
    if get_origin(kind) is tuple:
        inner = [part for part in get_args(kind) if part is not Ellipsis]
        count = "" if Ellipsis in get_args(kind) else f"{len(inner)} of "
        return f"a list ({count}{takes(inner[0])})"
    if get_origin(kind) is dict or kind is dict:
        return "a mapping"
    return KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as one would type it."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "needed"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"default `{str(value).lower()}`"
    if value in ([], {}, (), ""):
        return "default: none"
    if isinstance(value, tuple):
        return f"default `{list(value)}`"
    if isinstance(value, int) and value >= 10_000:
        return f"default `{value:_}`"
    return f"default `{value}`"


def section_of(kind: Any) -> type | None:
    """The dataclass that an option is a section of, if it is one."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    found = [m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)]
    return found[0] if found else None


def base_of(kind: Any) -> type | None:
    """The base class whose subclasses an option chooses among, if it is such an option."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    found = [m for m in members if isinstance(m, type) and m.__module__.startswith("gristmill.")]
    return found[0] if found and section_of(kind) is None else None


def fields_of(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any, str]]:
    """(field, type, help text) of a dataclass."""
    hints, texts = get_type_hints(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field, hints[field.name], texts.get(field.name, "")


def plain_options(cls: type, prefix: str) -> list[Option]:
    """The options of a dataclass that are no sections, `--PREFIXname` each."""
    return [
        Option(f"--{prefix}{field.name}", takes(kind), default_of(field), text)
        for field, kind, text in fields_of(cls)
        if section_of(kind) is None and base_of(kind) is None
    ]


def listed(options: list[Option], anchor: str = "") -> str:
    """Options as a definition list, each with an anchor of its name."""
    lines = []
    for option in options:
        name = option.name.lstrip("-")
        lines += [
            f"`{option.name}` · {option.takes} · {option.default} {{ #{anchor}{name} }}",
            "",
            f":   {escape(option.text) or '(see the name)'}",
            "",
        ]
    return "\n".join(lines)


def load(target: str) -> Any:
    """What `module:name` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def pages_of_commands() -> dict[str, tuple[Command, list[str]]]:
    """Page name → the command and all names it goes by, in the order of the command line."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, command in COMMANDS.items():
        found.setdefault((command.config, command.run), []).append(name)
    for other, name in SPELLINGS.items():
        if name in COMMANDS:  # some are refused by name
            command = COMMANDS[name]
            found[(command.config, command.run)].append(other)
    return {names[0].replace(" ", "-"): (COMMANDS[names[0]], names) for names in found.values()}


def command_page(command: Command, names: list[str]) -> str:
    """The page of one command."""
    cls = load(command.config)
    parts = [f"# gristmill {names[0]}", escape((cls.__doc__ or command.summary).strip())]
    parts.append(f"```text\n{usage(f'gristmill {names[0]}', command.positionals)}\n```")
    guide = GUIDES.get(names[0].split()[0])
    if guide:
        parts.append(f"[In use](../../{guide}.md)")
    if len(names) > 1:
        parts.append(f"Also spelled {' · '.join(f'`gristmill {other}`' for other in names[1:])}.")
    if command.listing:
        also = " `list --verbose` says more of each." if command.details else ""
        parts.append(
            f"`gristmill {names[0]}` alone, and `gristmill {names[0]} list`, print the names that "
            f"it knows.{also}"
        )
    parts.append(_all_options(cls))
    return "\n\n".join(parts) + "\n"


def _all_options(cls: type) -> str:
    """Every option of a command: its own, then a section for each group."""
    own: list[Option] = []
    sections: list[str] = []
    for field, kind, text in fields_of(cls):
        base, section = base_of(kind), section_of(kind)
        if base is not None:
            help_text = f"{text} Each has options of its own: `--{field.name}.help NAME`"
            own.append(Option(f"--{field.name}", "a name", "default: " + _chosen(field), help_text))
        elif section is ModelConfig:
            own.append(Option(f"--{field.name}", "a section", default_of(field), text))
        elif section is not None:
            title = f"## --{field.name}.… {{ #{field.name} }}"
            intro = escape((section.__doc__ or text).strip())
            body = listed(plain_options(section, f"{field.name}."))
            sections.append("\n\n".join([title, intro, body]))
        else:
            own.append(Option(f"--{field.name}", takes(kind), default_of(field), text))
    always = [
        Option(
            "--config",
            "a YAML file, the name of a bundled recipe, or a URL",
            "unset",
            "Settings in a file; options after it override it.",
        ),
        Option("--print_config", "nothing", "off", "Print all settings as such a file, and leave."),
    ]
    parts = ["## Options", listed([*own, *always]), *sections, _spellings(own), _further(cls)]
    return "\n\n".join(part for part in parts if part)


def _chosen(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{type(field.default_factory()).__name__}`"
    return "none"


def _spellings(options: list[Option]) -> str:
    names = {option.name for option in options}
    rows = [f"| `{other}` | `{ours}` |" for other, ours in ALIASES.items() if ours in names]
    if not rows:
        return ""
    return "\n".join(["## Other spellings", "", "| accepted too | means |", "|---|---|", *rows])


def _further(cls: type) -> str:
    """Links to the pages of classes that options choose among."""
    lines = []
    for _, kind, _ in fields_of(cls):
        base = base_of(kind)
        if base is not None:
            lines.append(f"- [{title_of(base)}](../{slug_of(base)}.md)")
        elif section_of(kind) is ModelConfig:
            lines.append(f"- [`--model_config`: every switch of the model](../{MODEL_FIELDS}.md)")
    return "\n".join(["## Options of what is chosen", "", *lines]) if lines else ""


def slug_of(base: type) -> str:
    """The page of the classes below `base`."""
    return _plural(base).replace(" ", "-")


def option_of(base: type) -> str:
    """The option that chooses among the classes below `base`."""
    return f"--{bases()[base]}"


def title_of(base: type) -> str:
    """What the page of the classes below `base` is called."""
    return f"`{option_of(base)}`: {_plural(base)}"


def _plural(base: type) -> str:
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", base.__name__).lower()
    return words if words.endswith("data") else f"{words}s"


def bases() -> dict[type, str]:
    """Every base class that an option of some command chooses among, and the option's name."""
    found: dict[type, str] = {}
    for command in COMMANDS.values():
        for field, kind, _ in fields_of(load(command.config)):
            base = base_of(kind)
            if base is not None:
                found.setdefault(base, field.name)
    return found


def classes_page(base: type) -> str:
    """The page of the classes that an option chooses among, each with its options."""
    option = option_of(base)
    prefix = option.lstrip("-")
    parts = [f"# {title_of(base)}", escape((base.__doc__ or "").strip())]
    for cls in sorted(subclasses(base), key=lambda c: (c.__module__, _line(c))):
        if not dataclasses.is_dataclass(cls) or cls.__subclasses__():
            continue
        parts.append(f"## {cls.__name__}")
        parts.append(f"`{option} {cls.__name__}`: {escape((cls.__doc__ or '').strip())}")
        parts.append(listed(plain_options(cls, f"{prefix}."), anchor=f"{cls.__name__}."))
        nested = [s for _, kind, _ in fields_of(cls) for s in _sections_within(kind)]
        parts += [_nested(section) for section in dict.fromkeys(nested)]
    rows = [f"| `--data.{theirs}` | `--data.{ours}` |" for theirs, ours in _foreign(base)]
    if rows:
        parts.append(
            "## Other spellings\n\n| accepted too | means |\n|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


def _foreign(base: type) -> list[tuple[str, str]]:
    """What settings of classes below `base` are called elsewhere, and here."""
    found = [
        pair
        for cls, settings in FOREIGN_SETTINGS.items()
        if issubclass(cls, base)
        for pair in settings.items()
    ]
    return [*found, ("path", "data_path")] if base is DataModule else found


def _line(cls: type) -> int:
    return inspect.getsourcelines(cls)[1]


def _sections_within(kind: Any) -> list[type]:
    """Dataclasses in a list or a mapping."""
    return [part for part in get_args(kind) if dataclasses.is_dataclass(part)]


def _nested(section: type) -> str:
    rows = [
        f"| `{field.name}` | {takes(kind)}, {default_of(field)} | {escape(text)} |"
        for field, kind, text in fields_of(section)
    ]
    return "\n".join(
        [f"Each {escape((section.__doc__ or '').strip().rstrip('.').lower())} has:", ""]
        + ["| setting | takes | |", "|---|---|---|", *rows]
    )


def model_page() -> str:
    """The page of `ModelConfig` and the dataclasses in it."""
    parts = [
        "# `--model_config`: every switch of the model",
        "One decoder makes every model: these are its switches, and a named model is a set of "
        "their values. `gristmill pretrain --model_config.hidden_size 256 …` makes a model of "
        "your own; in a file they stand below `model_config:`.",
    ]
    parts.append(listed(plain_options(ModelConfig, "model_config.")))
    for field, kind, text in fields_of(ModelConfig):
        section = section_of(kind)
        if section is not None:
            parts += [f"## {field.name}", escape(text or (section.__doc__ or "").strip())]
            parts.append(listed(plain_options(section, f"model_config.{field.name}.")))
    return "\n\n".join(parts) + "\n"


def overview() -> str:
    """The table of all commands."""
    rows = [
        f"| [`gristmill {names[0]}`]({slug}.md) | {escape(command.summary)} |"
        for slug, (command, names) in pages_of_commands().items()
    ]
    return "\n".join(
        [
            "# Commands",
            "",
            "Made from the code, as `gristmill COMMAND --help` is.",
            "",
            "| command | what it does |",
            "|---|---|",
            *rows,
            "",
            "## Scripts of other tools",
            "",
            "Each is a command of its own name, with its options; what it stands for is said when "
            "it runs. `scripts/NAME.py` is understood, too.",
            "",
            "| `gristmill …` | whose | is here |",
            "|---|---|---|",
            *(_script(name, script) for name, script in SCRIPTS.items()),
            "",
        ]
    )


def _script(name: str, script: Script) -> str:
    return f"| `{name}` | {escape(script.origin)} | `gristmill {shlex.join(script.command)}` |"


def pages() -> dict[str, str]:
    """All pages of this file, by their place on the site."""
    made = {"reference/commands/index.md": overview()}
    for slug, (command, names) in pages_of_commands().items():
        made[f"reference/commands/{slug}.md"] = command_page(command, names)
    for base in bases():
        made[f"reference/{slug_of(base)}.md"] = classes_page(base)
    made[f"reference/{MODEL_FIELDS}.md"] = model_page()
    return made

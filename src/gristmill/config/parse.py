"""Typed settings from defaults, a recipe and options, left to right; and the way back to YAML.

`jsonargparse` does the typing. Here are the spellings that users bring along (positional names,
older option names, LitGPT's class paths) and error messages in one form.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from gristmill.config.data import DataModule, RawText
from gristmill.config.explain import CLASS_OPTIONS, explain, subclasses
from gristmill.config.recipes import load_recipe
from gristmill.config.sections import Optimizer
from gristmill.config.tuning_data import TuningData
from gristmill.util.errors import UserError
from gristmill.util.named import look_here

T = TypeVar("T")

ALIASES = {
    "--initial_checkpoint_dir": "--checkpoint_dir",
    "--data.path": "--data.data_path",
    "--tokenizer_path": "--tokenizer_dir",
    "--checkpoint_path": "--checkpoint_dir",
    "--sys_prompt": "--system",
    "--checkpoint_file": "--checkpoint_dir",
    "--config_name": "--model_name",
    "--source_path": "--input_dir",
    "--destination_path": "--output_dir",
    "--match": "--pattern",
    "--chunk_size": "--chunk_tokens",
}
"""Other spellings of an option, each from a tool whose users come here."""

FOREIGN_CLASSES = {
    "torch.optim.AdamW": "AdamW",
    "torch.optim.adamw.AdamW": "AdamW",
    **{f"litgpt.data.{name}": name for name in ("TextFiles", "LitData", "OpenWebText")},
    "litgpt.data.TinyStories": "TinyStories",
    **{f"litgpt.data.{name}": name for name in ("JSON", "Alpaca", "Alpaca2k", "AlpacaGPT4")},
    **{f"litgpt.data.{name}": name for name in ("Dolly", "LIMA", "FLAN", "Deita", "LongForm")},
}
"""Class paths in LitGPT's configuration files and what they are called here."""

FOREIGN_SETTINGS: dict[type, dict[str, str]] = {
    RawText: {"data_path": "train_data_path", "val_split_fraction": "val_fraction"},
    TuningData: {"val_split_fraction": "val_fraction"},
}
"""Settings of LitGPT's modules and what they are called here, by the base of ours."""

WITHOUT_LIKE = {
    "data": ("ignore_index", "num_workers"),
    "eval": ("max_new_tokens", "evaluate_example"),
}
"""Settings in LitGPT's files of finetuning that change nothing that is learned."""

CHOSEN = (DataModule, TuningData, Optimizer)
"""Bases of the settings whose value is a class."""

SECRETS = ("--access_token", "--api_key")
"""Options that a printed configuration leaves out."""

NAMING = ("_dir", "_path", "_name", "layout", "resume", "hook", "config")
"""Endings of options that name something, which an empty text does not."""

CODE_SETTINGS = ("hook", "command")
"""Settings that name code to run; refused in a configuration that comes from a URL."""

LENGTHS = ("--train.max_steps", "--train.max_tokens", "--train.epochs", "--train.max_time")
"""Options that say how long a run is."""

SECTIONS = ("data", "optimizer", "model_config", "train", "eval", "log", "parallel", "ray", "slurm")
"""Settings that hold settings."""


def usage(prog: str, positionals: Sequence[str]) -> str:
    """`gristmill pretrain [MODEL_NAME] [OPTIONS]`: the words that a command takes."""
    words = [
        f"[{name.rstrip('+').upper()}{' ...' if name.endswith('+') else ''}]"
        for name in dict.fromkeys(positionals)
    ]
    return " ".join([prog, *words, "[OPTIONS]"])


def parser_for(command: type, prog: str, positionals: Sequence[str]) -> ArgumentParser:
    """The parser of one command: an option for every field of its dataclass, and `--config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=usage(prog, positionals),
        description=(command.__doc__ or "").strip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file, name of a bundled recipe, or URL; options after it override it.",
    )
    parser.add_class_arguments(command, as_group=False)
    return parser


def parse(command: type[T], argv: Sequence[str], *, prog: str, positionals: Sequence[str]) -> T:
    """The command's dataclass, filled from `argv`; `positionals` names the bare words' fields.

    Raises `UserError` for anything that does not fit, naming the option and the value.
    """
    parser = parser_for(command, prog, positionals)
    fields = dataclasses.fields(command)  # type: ignore[arg-type]
    flags = {f"--{field.name}" for field in fields if field.type in (bool, "bool")}
    arguments = normalise(argv, positionals, flags, {field.name for field in fields})
    if any(argument.partition("=")[0] == "--print_config" for argument in arguments):
        arguments = [a for a in arguments if a.partition("=")[0] not in SECRETS]
    try:
        config = _build(command, parser.instantiate(parser.parse_args(arguments)))
    except ArgumentError as error:
        options = [name for action in parser._actions for name in action.option_strings]
        raise explain(error.message, options, prog) from None
    _keep_texts(config, arguments)
    return config


def _build(command: type[T], namespace: Any) -> T:
    """The dataclass out of the parser's namespace of already instantiated fields."""
    names = {field.name for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    return command(**{key: value for key, value in vars(namespace).items() if key in names})


def _keep_texts(config: Any, arguments: Sequence[str]) -> None:
    """Give optional texts their typed value where the parser took it for YAML of something else.

    White space and what begins with `#` are nothing in YAML, and `- x` is a list; people stop at
    such texts and begin prompts with them. A list is meant where it has brackets.
    """
    typed = dict(argument[2:].partition("=")[::2] for argument in arguments if "=" in argument)
    for field in dataclasses.fields(config):
        text, value = typed.get(field.name), getattr(config, field.name)
        if text in (None, "null") or "str" not in str(field.type).split(" | "):
            continue
        if value is None or (isinstance(value, list) and not text.lstrip().startswith("[")):
            setattr(config, field.name, text)


def normalise(
    argv: Sequence[str],
    positionals: Sequence[str],
    flags: Collection[str] = (),
    known: Collection[str] = (),
) -> list[str]:
    """Arguments in the one form the parser knows: `--option=value`; aliases, recipes resolved.

    An option in `flags` may stand without a value and is then true. `known` are the names that the
    command has: another spelling counts only where its meaning is one of them.
    """
    arguments: list[str] = []
    names = iter(positionals)
    pending: str | None = None
    for word in argv:
        if pending in flags and word.startswith("--"):
            arguments.append(f"{pending}=true")
            pending = None
        if pending is not None:
            arguments.append(f"{pending}={_value(pending, word)}")
            pending = None
        elif word.startswith("-"):
            option, equals, value = word.partition("=")
            meant = ALIASES.get(option, option)
            if meant[2:].partition(".")[0] in known:
                option = meant
            if equals:
                arguments.append(f"{option}={_value(option, value)}")
            elif option in ("-h", "--help", "--print_config"):
                arguments.append(option)
            else:
                pending = option
        else:
            name = next(names, None)
            if name is None:
                raise UserError(
                    f"unexpected word {word!r}. Options start with --; a value follows its option."
                )
            arguments.append(f"--{name}={_value(f'--{name}', word)}")
    if pending is not None:
        # `--data.help` alone is complete; any other option lacks its value and the parser says so.
        arguments.append(f"{pending}=true" if pending in flags else pending)
    return _adopt_data_options(_with_fitting_warmup(_classes_first(arguments)))


def _classes_first(arguments: Sequence[str]) -> list[str]:
    """The arguments, `--data NAME` before the options of NAME, wherever it was typed."""
    ordered = list(arguments)
    for option in CLASS_OPTIONS:
        named = [i for i, a in enumerate(ordered) if a.partition("=")[0] == option]
        own = [i for i, a in enumerate(ordered) if a.startswith(f"{option}.")]
        if len(named) == 1 and own and own[0] < named[0]:
            ordered.insert(own[0], ordered.pop(named[0]))
    return ordered


def _with_fitting_warmup(arguments: list[str]) -> list[str]:
    """The arguments, a file's warm-up being left to `auto` where a shorter run is typed after it.

    The file's warm-up fits the length that the file says; what is typed itself is never touched.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    typed = [given[name] for name in LENGTHS if name in given]
    if not typed or "--train.lr_warmup_steps" in given:
        return arguments
    steps = given.get("--train.max_steps", "")
    most = int(steps) - 1 if len(typed) == 1 and steps.isdigit() else -1
    fitted = []
    for argument in arguments:
        option, _, value = argument.partition("=")
        content = yaml.safe_load(value) if option == "--config" else None
        train = content.get("train") if isinstance(content, dict) else None
        warmup = train.get("lr_warmup_steps") if isinstance(train, dict) else None
        if isinstance(train, dict) and isinstance(warmup, int) and warmup > most:
            del train["lr_warmup_steps"]
            argument = f"--config={yaml.safe_dump(content, width=10**9)}"
        fitted.append(argument)
    return fitted


def _adopt_data_options(arguments: list[str]) -> list[str]:
    """The arguments with the options of LitGPT's modules as they are called here."""
    module = ""
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option == "--data":
            given = yaml.safe_load(value)
            module = given.get("class_path", "") if isinstance(given, dict) else value
        elif option == "--config":
            given = yaml.safe_load(value).get("data")
            module = given.get("class_path", "") if isinstance(given, dict) else module
    theirs = _foreign_settings(module)
    if not theirs:
        return arguments
    adopted = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        setting = option.removeprefix("--data.")
        if option.startswith("--data.") and setting in theirs:
            option = f"--data.{theirs[setting]}"
        adopted.append(f"{option}{equals}{value}")
    return adopted


def _foreign_settings(class_path: str) -> dict[str, str]:
    """What settings of a data module are called elsewhere, and here; empty for a user's own."""
    name = FOREIGN_CLASSES.get(class_path, class_path)
    for package in ("gristmill.config.data.", "gristmill.config.tuning_data."):
        name = name.removeprefix(package)
    for base, settings in FOREIGN_SETTINGS.items():
        if name in {cls.__name__ for cls in subclasses(base)}:
            return settings
    return {}


def _value(option: str, value: str) -> str:
    """The value of an option in the form the parser takes."""
    if not value and option.endswith(NAMING):
        raise UserError(f"{option} is empty. Give it a value, or leave it out.")
    if option == "--config":
        return yaml.safe_dump(_adopt(load_recipe(value), from_url="://" in value), width=10**9)
    if option == "--data" and (Path(value).is_dir() or ("/" in value and "{" not in value)):
        return json.dumps({"class_path": "LitData", "init_args": {"data_path": value}})
    if option in ("--data", "--optimizer", "--data.help", "--optimizer.help"):
        return _class_path(value) if "{" not in value else value
    return value


def _class_path(name: str) -> str:
    """A class as the parser names it; one of the user's own is looked for here, too."""
    path = FOREIGN_CLASSES.get(name, name).replace(":", ".")
    if "." in path and not path.startswith("gristmill."):
        look_here()
    return path


def _adopt(config: dict[str, Any], *, from_url: bool) -> dict[str, Any]:
    """A configuration file's content in our words; LitGPT's files are taken as they are."""
    if from_url:
        _refuse_code(config)
    if isinstance(path := config.pop("dataset_path", None), str):  # of the Ray guide's script
        config["data"] = {"class_path": "LitData", "init_args": {"data_path": path}}
    for key in ("data", "optimizer"):
        section = config.get(key)
        if isinstance(section, str):
            config[key] = {"class_path": _class_path(section)}
        elif isinstance(section, dict) and "class_path" in section:
            name = str(section["class_path"])
            section["class_path"] = _class_path(name)
            init, theirs = section.get("init_args"), _foreign_settings(section["class_path"])
            if theirs and isinstance(init, dict):
                section["init_args"] = {theirs.get(k, k): v for k, v in init.items()}
            if name.startswith("litgpt.data."):
                _leave_out(config)
    return {key: value for key, value in config.items() if value is not None}


def _leave_out(config: dict[str, Any]) -> None:
    """Take out of another tool's file what has no like here and changes nothing that is learned.

    It also writes down what it leaves unset.
    """
    data, evaluation = config["data"].get("init_args"), config.get("eval")
    for section, names in ((data, WITHOUT_LIKE["data"]), (evaluation, WITHOUT_LIKE["eval"])):
        if isinstance(section, dict):
            for name in names:
                section.pop(name, None)
    if isinstance(data, dict):
        config["data"]["init_args"] = {k: v for k, v in data.items() if v is not None}
    for name in ("train", "eval"):
        section = config.get(name)
        if isinstance(section, dict):
            # Of these only max_norm says something when it is null.
            config[name] = {k: v for k, v in section.items() if v is not None or k == "max_norm"}


def _refuse_code(config: dict[str, Any]) -> None:
    """Raise UserError where a configuration from elsewhere could make this program import code.

    Only classes of ours may be named, and sections only be written out: a dotted key or the path
    of another file in a section's place would pass by this check.
    """
    for key, value in _entries(config):
        last = key.rpartition("/")[2]
        named = last in CODE_SETTINGS or last == "class_path" or key in ("data", "optimizer")
        code = named and isinstance(value, str) and not _is_ours(value)
        hidden = "." in last or (key in SECTIONS and not isinstance(value, (dict, type(None))))
        if code or (hidden and not (named and isinstance(value, str) and _is_ours(value))):
            raise UserError(
                f"the configuration names code to run or hides it ({key}: {value}) but comes from "
                "a URL. Download it, read it, and give the file to --config."
            )


def _entries(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, nested keys as `outer/inner`."""
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}/")


def _is_ours(class_path: str) -> bool:
    known = {cls.__name__ for base in CHOSEN for cls in subclasses(base)}
    package, _, name = class_path.rpartition(".")
    ours = not package or package.startswith("gristmill.config.") or package == "gristmill.config"
    return class_path in FOREIGN_CLASSES or (ours and name in known)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a command's dataclass, classes as `class_path` and `init_args`."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, CHOSEN):
        kind = type(value)
        init = to_dict(value) if dataclasses.is_dataclass(value) else dict(vars(value))
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": init}
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def to_yaml(config: Any) -> str:
    """The command's dataclass as YAML that `--config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)

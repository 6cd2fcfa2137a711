"""The parser's errors in one form: which option, which value, what it takes, what is near."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence

from gristmill.config.data import DataModule
from gristmill.config.sections import Optimizer
from gristmill.config.tuning_data import TuningData
from gristmill.util.errors import UserError

CLASS_OPTIONS: dict[str, type] = {"--data": DataModule, "--optimizer": Optimizer}
"""Options whose value is the name of a class, with the base of those classes."""

BASES = ("RawText", "Records", "HubRecords")
"""Classes that others derive from, and nobody chooses."""

ELSEWHERE = {
    "--parallel.pipeline": "There is no pipeline parallel yet: use --parallel.shard and tensor.",
    "--data.ignore_index": "Leave it out: what is masked counts nothing, whatever marks it.",
    "--data.num_workers": "Leave it out: records are encoded once, before training.",
    "--access_token": "Set HF_TOKEN in the environment; an option would be written down.",
    "--data.access_token": "Set HF_TOKEN in the environment; an option would be written down.",
    "--eval.max_new_tokens": "--eval.sample_prompt and --eval.sample_tokens show what is written.",
    "--eval.evaluate_example": "--eval.sample_prompt shows what the model writes.",
    "--quantize": "Training on quantised weights is not there: leave it out. --precision bf16-true "
    "(half the memory of weights) and --recompute full (little for activations) save most.",
    "--percentage": "Choose files by --pattern, or take a small slice by --fast_dev_run true.",
    "--convert_checkpoint": "Nothing needs converting here: leave it out.",
    "--dtype": "Leave it out: weights stay as they come, and --precision of a command reads them.",
}
"""Options of other tools that have no like here, and what to do instead."""

NESTED = re.compile(r"NestedArg\(key='[^']*', val=(.+)\)")
"""How the parser shows the value of an option deep in settings."""

PLAIN_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list such as [0.9, 0.95]",
    "NoneType": "null",
}


def explain(text: str, options: Sequence[str], prog: str) -> UserError:
    """The user's mistake behind a message of the parser; `options` are the command's own."""
    unknown = re.match(r"unrecognized arguments: (\S+)", text)
    if unknown:
        return _unknown(unknown[1].partition("=")[0], options, prog)
    group = re.match(r"Group '([^']+)' does not accept option '([^']+)'", text)
    if group:
        return _unknown(f"--{group[1]}.{group[2]}", options, prog)
    top = re.match(r"Option '([^']+)' is not accepted", text)
    if top:
        return _unknown(f"--{top[1]}", options, prog)
    keys = re.findall(r'[Kk]ey "([^"]+)"', text)
    if not keys:
        return UserError(f"{' '.join(text.split())}. See `{prog} --help`.")
    base = CLASS_OPTIONS.get(f"--{keys[0]}")
    if base is DataModule and " finetune" in prog:
        base = TuningData
    option = "--" + ".".join(keys)
    if base is not None and len(keys) == 1:
        return _bad_class(text, option, base, prog)
    refused = re.findall(r"Option '([^']+)' is not accepted", text)
    if refused:
        near = [name for name in options if name.startswith(f"{option}.")]
        return _unknown(f"{option}.{refused[-1]}", near, prog)
    missing = re.search(r"following arguments are required: ([^\n]+)", text)
    if missing:
        return _lacking(option, missing[1])
    # Of an option deep in optional settings the parser also says what could stand for them all.
    end = r"\. Got value" if NESTED.search(text) else r"(?:\. Got value|$)"
    expected = sorted(set(re.findall(rf"Expected an? ([^\n]+?){end}", text, re.MULTILINE)))
    wanted = " or ".join(_plain(kind) for kind in expected) or "another kind of value"
    return UserError(
        f"{option} {_given(text)} does not fit. It takes {wanted}; see `{prog} --help`."
    )


def subclasses(cls: type) -> set[type]:
    """A class and all classes derived from it."""
    found = {cls}
    children: list[type] = cls.__subclasses__()
    for child in children:
        found |= subclasses(child)
    return found


def _bad_class(text: str, option: str, base: type, prog: str) -> UserError:
    """A class option that names no class, or options that its class does not have."""
    classes = {c.__name__: c for c in subclasses(base) if dataclasses.is_dataclass(c)}
    names = sorted(name for name in classes if name not in BASES)
    named = re.search(r"class_path '([^']+)'", text)
    refused = re.search(r"Option '([^']+)' is not accepted", text)
    if refused and named:
        chosen = classes.get(named[1].rpartition(".")[2])
        if chosen is None:
            fit = [
                name
                for name in names
                if refused[1] in {field.name for field in dataclasses.fields(classes[name])}
            ]
            return UserError(
                f"{option}.{refused[1]} belongs to a class that is not chosen. "
                f"Add {option} with one of: {', '.join(fit or names)}."
            )
        known = [f"{option}.{field.name}" for field in dataclasses.fields(chosen)]
        return _unknown(f"{option}.{refused[1]}", known, prog)
    missing = re.search(r"following arguments are required: (.+)", text)
    if missing:
        return _lacking(option, missing[1])
    reason = named and re.search(r"class_path '[^']+':\s+(.+)", text)
    if reason:
        return UserError(
            f"{option} {_given(text)} cannot be loaded ({reason[1].strip()}). "
            "Give module:Class of an importable class."
        )
    value = re.search(r"dot import path string: (.+)", text)
    given = value[1] if value else _given(text)
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), folded, n=1, cutoff=0.6)
    return UserError(
        f"{option} {given} is not known. Choose {', '.join(names)}"
        + (f" (did you mean {folded[near[0]]}?)" if near else "")
        + f"; `{prog} {option}.help NAME` lists its options. Your own class is module:Class."
    )


def _lacking(option: str, names: str) -> UserError:
    needed = ", ".join(f"{option}.{name.strip()}" for name in names.split(","))
    return UserError(f"{option} lacks a setting it needs. Add {needed}.")


def _given(text: str) -> str:
    nested = NESTED.search(text)
    if nested:
        return nested[1].strip("'\"")
    values = re.findall(r"(?:Given|Got) value: (.+)", text)
    return values[-1].strip() if values else text.splitlines()[-1].strip()


def _plain(kind: str) -> str:
    """A type as a person would say it."""
    kind = kind.replace("typing.", "").replace("<class '", "").replace("'>", "")
    if kind.startswith("Literal["):
        return ", ".join(part.strip().strip("'") for part in kind[8:-1].split(","))
    return PLAIN_TYPES.get(kind, kind)


def _unknown(option: str, known: Sequence[str], prog: str) -> UserError:
    near = difflib.get_close_matches(option, known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"`{prog} --help` lists the options."
    hint = ELSEWHERE.get(option, hint)
    return UserError(f"unknown option {option}. {hint}")

"""The scripts of other tools' tutorials: what each means as a command here. Words in, words out.

    python scripts/prepare_slimpajama.py --input_dir …   is here
    gristmill prepare_slimpajama --input_dir …           and that is
    gristmill prepare slimpajama --input_dir …

A script may be named as in the tutorial, with its folder and `.py`.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

VAL_FRACTION = "0.005"
"""Text that `optimize_dataset` holds out; the original holds out three files of ten."""


@dataclass(frozen=True)
class Script:
    """A script: the command that it is, its options under other names, and what it adds."""

    command: tuple[str, ...]
    """The command and the options that the script sets by itself; the user's come after them."""
    origin: str
    """Whose script it is."""
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Its spelling of an option -> the words here, of which the last takes the value."""
    dropped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Options that mean nothing here when they have one of these values."""
    added: Callable[[set[str]], list[str]] = lambda given: []
    """More words, from the options that are given."""


def _optimize_dataset(given: set[str]) -> list[str]:
    """Some text held out, and the nodes of a Ray cluster where this machine is part of one."""
    added = []
    if not given & {"--val_fraction", "--val_pattern"}:
        added += ["--val_fraction", VAL_FRACTION]
    if "--executor" not in given and on_ray():
        added += ["--executor", "ray"]
    return added


def _distributed_pretrain(given: set[str]) -> list[str]:
    """The tracker that the guide's next words set a key for, where it is installed."""
    keyed = os.environ.get("WANDB_API_KEY") and importlib.util.find_spec("wandb")
    return ["--logger_name", "wandb"] if keyed and "--logger_name" not in given else []


def on_ray() -> bool:
    """Whether this machine is part of a Ray cluster: where Ray leaves that cluster's address.

    Everybody can write there: another user's file would send this user's work to that cluster.
    """
    if os.environ.get("RAY_ADDRESS"):
        return True
    known = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        found = known.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


_WHOLE: dict[str, tuple[str, ...]] = {"--percentage": ("1", "1.0")}
_DATASET = ("--data", "LitData", "--data.data_path")
_VALIDATION = ("--data.val_data_path",)

SCRIPTS = {
    "prepare_slimpajama": Script(
        ("prepare", "slimpajama"), "LitGPT, TinyLlama: scripts/prepare_slimpajama.py", {}, _WHOLE
    ),
    "prepare_starcoder": Script(
        ("prepare", "starcoder"), "LitGPT, TinyLlama: scripts/prepare_starcoder.py", {}, _WHOLE
    ),
    "prepare_redpajama": Script(
        ("prepare", "redpajama"), "lit-llama: scripts/prepare_redpajama.py"
    ),
    "tinyllama": Script(
        ("pretrain", "--config", "pretrain/tinyllama", "--out_dir", "out/tiny-llama-1.1b"),
        "LitGPT, TinyLlama: pretrain/tinyllama.py",
        {"--train_data_dir": _DATASET, "--val_data_dir": _VALIDATION},
        {"--tpu": ("False", "false")},
    ),
    "train_redpajama": Script(
        ("pretrain", "--config", "pretrain/llama-7b-redpajama", "--out_dir", "out/training"),
        "lit-llama: train_redpajama.py, pretrain/redpajama.py",
        {
            "--train_data_dir": ("--data", "RedPajama", "--data.data_path"),
            "--val_data_dir": _VALIDATION,
        },
    ),
    "optimize_dataset": Script(
        ("prepare", "fineweb"),
        "the Ray guide: optimize_dataset.py",
        added=_optimize_dataset,
    ),
    "distributed_pretrain": Script(
        ("pretrain", "--launcher", "ray"),
        "the Ray guide: distributed_pretrain.py",
        {"--dataset_path": _DATASET},
        added=_distributed_pretrain,
    ),
    "convert_hf_checkpoint": Script(
        ("convert_to_litgpt",), "lit-gpt: scripts/convert_hf_checkpoint.py"
    ),
}
"""By the name of the file; scripts whose name a command has are not here."""

ALSO = {"redpajama": "train_redpajama", "consolidate": "consolidate_checkpoint"}
"""Other names of script files."""


def named(word: str) -> str:
    """The name of the script or command that a word such as `scripts/download.py` stands for."""
    name = word
    if word.endswith(".py"):
        name = Path(word).stem
    elif word.startswith("lightning."):
        name = word.rpartition(".")[2]
    return ALSO.get(name, name) if name != word else word


def translate(words: Sequence[str]) -> list[str]:
    """The words of a command here that do what these do; other words are given back as they are."""
    if not words:
        return []
    name = named(words[0])
    script = SCRIPTS.get(name)
    if script is None:
        return [name, *words[1:]]
    rest: list[str] = []
    given: set[str] = set()
    pending = iter(words[1:])
    for word in pending:
        option, equals, value = word.partition("=")
        given.add(option)
        if option in script.dropped:
            value = value if equals else next(pending, "")
            if value not in script.dropped[option]:
                rest += [option, value]
        elif option in script.options:
            *before, last = script.options[option]
            rest += [*before, f"{last}{equals}{value}"]
        else:
            rest.append(word)
    return [*script.command, *script.added(given), *rest]

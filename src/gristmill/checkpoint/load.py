"""Checkpoints read back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gristmill.checkpoint import store
from gristmill.checkpoint.ranks import ALONE, Ranks
from gristmill.checkpoint.state import allocate_optimizer_state, model_state
from gristmill.checkpoint.torch_dcp import plain_errors, quiet_single_process
from gristmill.util.errors import RunError, UserError

NUM_NAMES_SHOWN = 3


def newest_good(out_dir: str | Path, ranks: Ranks = ALONE) -> Path | None:
    """The newest intact checkpoint of a run, or None where there is no checkpoint at all.

    Every byte is read and compared, by each rank its share; all get the same answer. Each damaged
    checkpoint passed over is said in one line. Raises RunError, naming them, when all are damaged.
    """
    damage: list[str] = []
    for path in ranks.main_says(store.complete(out_dir)):
        what = next((found for found in ranks.gather(_damage(path, ranks)) if found), None)
        if what is None:
            return path
        damage.append(what)
        if ranks.is_main:
            store.say(f"{path.name} is not used: {what}.")
    if damage:
        raise RunError(
            f"every checkpoint in {out_dir} is damaged: {'; '.join(damage)}. "
            "Restore one from a copy, or start anew with --overwrite true."
        )
    return None


def _damage(path: Path, ranks: Ranks) -> str | None:
    try:
        store.verify(path, ranks.rank, ranks.world)
    except RunError as error:
        return str(error).split(". ")[0]
    return None


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    verified: bool = False,
    ranks: Ranks = ALONE,
    trained_only: bool = False,
) -> dict[str, Any]:
    """Put a checkpoint into `model` (and `optimizer`), in place; returns its record.

    With `trained_only` it holds the trained parameters alone, and the others stay as they are.

    The state may have been saved by any number of processes; all `ranks` load together. Learning
    rates and other hyperparameters are left as they are. `verified` skips the digests, after
    `newest_good`. Raises RunError for a damaged checkpoint, UserError for one of another model or
    optimizer.
    """
    path = Path(path)
    record = store.read_record(path)
    if not verified:
        store.verify(path)
    quiet_single_process()
    weights = model_state(model, trained_only=trained_only)
    _check_model(path, weights, _saved_tensors(path / "weights"))
    if optimizer is not None:
        _check_optimizer(path, record, model, optimizer)
    _read(path / "weights", weights, ranks)
    if optimizer is not None:
        saved = _saved_tensors(path / "optimizer")
        _read(path / "optimizer", allocate_optimizer_state(model, optimizer, saved), ranks)
    return record


def _read(directory: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    if state:
        reader = HuggingFaceStorageReader(str(directory))
        with plain_errors():
            dcp.load(state, storage_reader=reader, process_group=ranks.group)


def _saved_tensors(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Names, shapes and types in a directory of safetensors; empty where there is none."""
    if not directory.is_dir():
        return {}
    entries = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _check_model(
    path: Path, wanted: Mapping[str, Tensor], saved: Mapping[str, TensorStorageMetadata]
) -> None:
    problems = []
    for what, names in (
        ("lacks", wanted.keys() - saved.keys()),
        ("has besides", saved.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{what} {_some(names)}")
    for name in sorted(wanted.keys() & saved.keys()):
        here, there = wanted[name], saved[name]
        if here.shape != there.size or here.dtype != there.properties.dtype:
            problems.append(
                f"has {name} as {list(there.size)} {_short(there.properties.dtype)}, "
                f"not {list(here.shape)} {_short(here.dtype)}"
            )
    if problems:
        raise UserError(
            f"{path} is a checkpoint of another model or precision: it {problems[0]}. "
            "Use the settings it was made with, or take only its weights with "
            f"--initial_checkpoint_dir {path} and a new --out_dir."
        )


def _check_optimizer(
    path: Path, record: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    name = type(optimizer).__name__
    if record["optimizer"] != name:
        raise UserError(
            f"{path} was written with the optimizer {record['optimizer']}, this run uses {name}. "
            f"Set --optimizer {record['optimizer']}, or take only the weights with "
            f"--initial_checkpoint_dir {path} and a new --out_dir."
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    here = {n for n, p in model.named_parameters() if id(p) in trained}
    extra = {n.rsplit(".", 1)[0] for n in _saved_tensors(path / "optimizer")} - here
    if extra:
        raise UserError(
            f"{path} has optimizer state of {_some(extra)}, which this run does not train. "
            f"Take only its weights with --initial_checkpoint_dir {path} and a new --out_dir."
        )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:NUM_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

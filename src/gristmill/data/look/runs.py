"""What a training run reads, from the record in its directory."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gristmill.config.commands import Pretrain
from gristmill.config.parse import parse
from gristmill.config.sections import TrainArgs
from gristmill.data.look.find import Open
from gristmill.data.modules import Datasets, open_datasets
from gristmill.data.reading.corpus import Corpus, Part
from gristmill.util.errors import UserError

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Reading:
    """How a run reads its data. `tokenizer_dir` is what the run was given, if anything."""

    corpus: Corpus
    settings: TrainArgs
    seq_len: int
    global_batch_size: int
    seed: int
    total_steps: int
    tokenizer_dir: str | None


def read_run(folder: Path, data_path: str | Path | None, open_dataset: Open) -> Reading:
    """How the run in `folder` reads its data, or the same data at `data_path`.

    Raises UserError when there is no run, or the data is not what it was trained on.
    """
    record = _record(folder)
    settings, length = record["settings"], record["length"]
    seed = record["identity"].get("data.seed")
    if data_path is not None and seed is not None:
        found = Datasets(data_path, None, int(seed))
    else:
        found = _datasets(settings)
    parts = found.train if isinstance(found.train, tuple) else (Part(found.train),)
    corpus = Corpus(parts, [open_dataset(part.path) for part in parts], found.later)
    if corpus.dataset_id != (trained := record["identity"]["data"]):
        raise UserError(
            f"{' and '.join(str(part.path) for part in parts)} is not what the run in {folder} was "
            f"trained on: its id is {corpus.dataset_id[:12]}, the run's data had {trained[:12]}. "
            "name the run's own data, or nothing where it has not moved."
        )
    return Reading(
        corpus=corpus,
        settings=TrainArgs(**settings["train"]),
        seq_len=int(length["seq_len"]),
        global_batch_size=int(length["global_batch_size"]),
        seed=found.seed,
        total_steps=int(length["total_steps"]),
        tokenizer_dir=settings.get("tokenizer_dir"),
    )


def consumed(folder: Path, step: int, global_batch_size: int) -> int:
    """Samples that the run had read before `step` (from 1).

    As the run counted them: one that was forked from another may have changed its batch.
    """
    known_step = known_samples = 0
    path = folder / METRICS_FILE
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    number, samples = int(row["step"]), int(row["samples"])
                    if known_step <= number < step:
                        known_step, known_samples = number, samples
                    elif number == step:
                        known_step, known_samples = step - 1, samples - global_batch_size
    return known_samples + (step - 1 - known_step) * global_batch_size


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run (no {RUN_FILE} in it). give --run the out_dir of a training."
        )
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        if str(record["identity"].get("command", "")).startswith("finetune"):
            raise UserError(
                f"{folder} is a finetuning, and its samples are records, not chunks of a dataset. "
                "Its first lines say how they became text; --eval.sample_prompt shows the model."
            )
        _ = record["length"]["seq_len"], record["identity"]["data"]
        _ = record["settings"]["data"], TrainArgs(**record["settings"]["train"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}). give --run another training, or leave it out and "
            "name the dataset with --seq_len, --global_batch_size and --seed."
        ) from error
    return dict(record)


def _datasets(settings: dict[str, Any]) -> Datasets:
    """The datasets of a run's settings."""
    words = ["--data", json.dumps(settings["data"])]
    cfg = parse(Pretrain, words, prog="gristmill pretrain", positionals=())
    assert cfg.data is not None
    tokenizer = settings.get("tokenizer_dir") or settings.get("initial_checkpoint_dir")
    with contextlib.redirect_stdout(sys.stderr):
        return open_datasets(cfg.data, Path(tokenizer) if tokenizer else None)

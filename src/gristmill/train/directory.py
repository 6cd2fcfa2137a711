"""The run directory: whose it is, what it already holds, and where a run goes on from.

    out_dir/
      run.yaml          settings as typed, what `auto` became, identity        (written first)
      metrics.jsonl     one row per step
      step-00001000/    checkpoints
      final/            the finished model directory                          (written last)
      .lock             held by the one process that writes

The identity is what may not change when a run continues; everything else may (docs/resume.md).
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from gristmill import __version__
from gristmill.checkpoint import mirror
from gristmill.checkpoint.load import newest_good
from gristmill.checkpoint.ranks import ALONE, Ranks
from gristmill.checkpoint.store import clean_partial, complete, step_of
from gristmill.config.commands import Training
from gristmill.config.parse import to_dict
from gristmill.train.length import Length
from gristmill.util.errors import UserError
from gristmill.util.secrets import redacted

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
TRACKER_IDS = ("wandb_id", "mlflow_id", "trackio_id")
"""What the run is called elsewhere."""

FIXED_TRAIN_SETTINGS = (
    "global_batch_size",
    "max_seq_length",
    "schedule",
    "lr_warmup_steps",
    "lr_warmup_fraction",
    "lr_decay_fraction",
    "min_lr",
    "max_norm",
    "z_loss",
    "document_mask",
    "batch_order",
    "packing",
)
"""Settings of `train` that belong to a run's identity."""


@dataclass(frozen=True)
class Record:
    """What `run.yaml` says of the run in a directory."""

    identity: dict[str, Any]
    length: Length
    micro_batch_size: int


def identity(
    cfg: Training, model: dict[str, Any], data: str, precision: str, *, start: str | None = None
) -> dict[str, Any]:
    """What makes this run the run it is, as plain data; `auto` stays `auto`.

    `start` names the weights that it starts from.
    """
    typed = to_dict(cfg)
    fixed = [name for name in FIXED_TRAIN_SETTINGS if name in typed["train"]]
    train = {f"train.{name}": typed["train"][name] for name in fixed}
    return {
        "model": model,
        "data": data,
        "data.seed": getattr(getattr(cfg, "data", None), "seed", None),
        "seed": cfg.seed,
        "precision": precision,
        "optimizer": typed["optimizer"],
        "initial_checkpoint_dir": start,
        **train,
    }


def find(cfg: Training, wanted: dict[str, Any], name: str) -> tuple[Path, Record | None]:
    """The run's directory and, where it continues a run, that run's record.

    Without `--out_dir` it is the newest `out/<name>-<n>` of the same identity, else the next
    number. Raises UserError for a directory that holds another run, unless it may be overwritten.
    """
    if cfg.out_dir is None:
        source = _run_dir_of(cfg.resume)
        if cfg.remote_dir is not None:
            raise UserError(
                f"--remote_dir {cfg.remote_dir} is the copy of a run: name its directory too.",
                {"--out_dir": Path("out") / name},
            )
        if source is None:
            return _find_numbered(Path("out"), name, wanted, cfg)
        out_dir = source
    else:
        out_dir = Path(cfg.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(
            f"out_dir {out_dir} is a file. Give a directory.",
            {"--out_dir": out_dir.with_name(out_dir.name + "-run")},
        )
    if cfg.overwrite:
        named = _run_dir_of(cfg.resume)
        if named is not None and named.resolve() == out_dir.resolve():
            raise UserError(
                f"--overwrite would delete the run in {out_dir} that --resume {cfg.resume} starts "
                "from. Choose another --out_dir.",
                {"--out_dir": next_free(out_dir), "--overwrite": None},
            )
        return out_dir, None
    if cfg.remote_dir is not None:
        _bring(cfg, cfg.remote_dir, out_dir, wanted)
    record = read(out_dir)
    if record is not None and not complete(out_dir) and not (out_dir / METRICS_FILE).exists():
        record = None  # it ended before its first step and left nothing to protect
    if record is None:
        _refuse_others(out_dir)
        if (out_dir / "final").exists() or complete(out_dir):
            raise UserError(
                f"{out_dir} holds checkpoints but no {RUN_FILE}, so it is not known what they are "
                "of. Choose another --out_dir, or delete them with --overwrite true.",
                {"--out_dir": next_free(out_dir)},
            )
        return out_dir, None
    if cfg.resume is False:
        raise UserError(
            f"{out_dir} already holds a run and --resume is false. "
            "Choose another --out_dir, or delete it with --overwrite true.",
            {"--out_dir": next_free(out_dir)},
        )
    changed = differences(record.identity, wanted)
    if changed:
        raise UserError(
            f"{out_dir} holds another run: {'; '.join(changed)}. Use another --out_dir, "
            "or delete that run with --overwrite true.",
            {"--out_dir": next_free(out_dir)},
        )
    return out_dir, record


def _bring(cfg: Training, url: str, out_dir: Path, wanted: dict[str, Any]) -> None:
    """Take over the run that is at `url`, where it is further than this directory's."""
    content = mirror.record_at(url)
    if content is None:
        return
    try:
        identity = yaml.safe_load(content)["identity"]
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{url}/{RUN_FILE} cannot be read. Give another --remote_dir.") from None
    changed = differences(identity, wanted)
    if changed or cfg.resume is False:
        why = f"another run: {'; '.join(changed)}" if changed else "a run, and --resume is false"
        raise UserError(
            f"--remote_dir {url} already holds {why}. Give another --remote_dir, or delete that "
            "run there and here with --overwrite true."
        )
    here = read(out_dir)
    if _run_dir_of(cfg.resume) is not None or (here and differences(here.identity, wanted)):
        return  # a place is named; or the directory is refused, with its own words
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / ".fetch.lock").open("a+") as one_of_all:
        fcntl.flock(one_of_all, fcntl.LOCK_EX)
        newest = next(map(step_of, complete(out_dir)), -1)
        # Another machine may have gone on since this one stopped.
        if (mirror.newest(url) or -1) > newest:
            mirror.fetch(url, out_dir)


def mirror_of(cfg: Training, out_dir: Path) -> mirror.Mirror | None:
    """What copies the run to `--remote_dir`; None without one."""
    if cfg.remote_dir is None:
        return None
    keep = {"keep_last": cfg.train.keep_last, "keep_every": cfg.train.keep_every}
    return mirror.Mirror(cfg.remote_dir, out_dir, **keep)


def _refuse_others(out_dir: Path) -> None:
    """Another tool's checkpoints are neither gone on from unasked nor written among."""
    theirs = sorted(
        path.parent
        for path in out_dir.glob("*/lit_model.pth")
        if path.parent.name == "final" or path.parent.name.startswith("step-")
    )
    if theirs:
        best = next((path for path in theirs if path.name == "final"), theirs[-1])
        raise UserError(
            f"{out_dir} holds checkpoints of another tool ({best.name}/lit_model.pth). Their "
            "weights can start a run in a directory of its own.",
            {
                "--resume": None,
                "--initial_checkpoint_dir": best,
                "--out_dir": next_free(out_dir),
            },
        )


def start_point(
    cfg: Training, out_dir: Path, *, going_on: bool, ranks: Ranks = ALONE
) -> Path | None:
    """The checkpoint to go on from, verified; None for a run that starts afresh.

    All `ranks` ask together, and get the same answer.
    """
    source = _run_dir_of(cfg.resume)
    if source is not None:
        forked = source.resolve() != out_dir.resolve()
        # A fork that was interrupted goes on from its own checkpoints.
        own = newest_good(out_dir, ranks) if forked and going_on else None
        return own or _named_checkpoint(Path(str(cfg.resume)), out_dir, ranks)
    if cfg.resume is False or cfg.overwrite:
        return None
    newest = newest_good(out_dir, ranks) if going_on else None
    if newest is None and cfg.resume is True:
        raise UserError(
            f"--resume true, but {out_dir} has no checkpoint. Use --resume auto to start afresh.",
            {"--resume": "auto"},
        )
    return newest


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` for every setting that differs, nested names dotted."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            found.append(f"{key}: {a} -> {b}")
    return found


def next_free(path: Path) -> Path:
    """`path` with the first number behind it that no directory has."""
    stem, _, number = path.name.rpartition("-")
    base = path.with_name(stem) if stem and number.isdigit() else path
    n = int(number) + 1 if stem and number.isdigit() else 2
    while base.with_name(f"{base.name}-{n}").exists():
        n += 1
    return base.with_name(f"{base.name}-{n}")


def read(out_dir: Path) -> Record | None:
    """The record of the run in `out_dir`; None when there is none."""
    path = out_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Record(
            identity=saved["identity"],
            length=Length(**saved["length"]),
            micro_batch_size=int(saved["micro_batch_size"]),
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Choose another --out_dir, "
            "or delete the run with --overwrite true.",
            {"--out_dir": next_free(out_dir)},
        ) from None


def write(
    out_dir: Path, cfg: Training, wanted: dict[str, Any], length: Length, micro_batch_size: int
) -> None:
    """Record the run, atomically."""
    content = {
        "gristmill": __version__,
        "settings": redacted(to_dict(cfg)),
        "length": dataclasses.asdict(length),
        "micro_batch_size": micro_batch_size,
        "identity": wanted,
    }
    # A round trip through YAML makes tuples lists, so that what is read compares equal.
    temporary = out_dir / f".{RUN_FILE}.{os.getpid()}"
    temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    os.replace(temporary, out_dir / RUN_FILE)


def lock(out_dir: Path) -> IO[str]:
    """An open file that makes this process the directory's one writer until it is closed.

    Makes the directory. Raises UserError when it cannot, or when another process holds it.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        handle = (out_dir / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"the run directory {out_dir} cannot be written ({error.strerror}). "
            "Choose another --out_dir."
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise UserError(
            f"{out_dir} is being written by another process (pid {owner}). "
            "Wait for it, stop it, or choose another --out_dir.",
            {"--out_dir": next_free(out_dir)},
        ) from None
    handle.seek(0)
    handle.truncate()
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def clear(out_dir: Path, remote_dir: str | None = None) -> None:
    """Delete a run's files (and nothing else) from its directory and its copy; the lock stays."""
    if remote_dir is not None:
        mirror.clear(remote_dir)
    for path in complete(out_dir):
        shutil.rmtree(path)
    clean_partial(out_dir)
    if not (out_dir / RUN_FILE).is_file():
        return  # what else is here is not of a run
    for name in ("final", "tensorboard", "wandb"):
        if (out_dir / name).is_dir():
            shutil.rmtree(out_dir / name)
    for name in (METRICS_FILE, "samples.jsonl", "metrics.csv", *TRACKER_IDS, RUN_FILE):
        (out_dir / name).unlink(missing_ok=True)


def _find_numbered(
    root: Path, name: str, wanted: dict[str, Any], cfg: Training
) -> tuple[Path, Record | None]:
    numbers = sorted(
        (
            int(path.name[len(name) + 1 :])
            for path in root.glob(f"{name}-*")
            if _numbered(path, name)
        ),
        reverse=True,
    )
    if cfg.resume is not False and not cfg.overwrite:
        for number in numbers:
            path = root / f"{name}-{number}"
            record = read(path)
            if record is not None and not differences(record.identity, wanted):
                return path, record
    return root / f"{name}-{numbers[0] + 1 if numbers else 1}", None


def _numbered(path: Path, name: str) -> bool:
    return path.is_dir() and path.name[len(name) + 1 :].isdigit()


def _run_dir_of(resume: bool | str) -> Path | None:
    """The run directory of a checkpoint named by `--resume PATH`."""
    if not isinstance(resume, str) or resume == "auto":
        return None
    path = Path(resume)
    return path.parent if path.name.startswith("step-") else path


def _named_checkpoint(path: Path, out_dir: Path, ranks: Ranks) -> Path:
    """The checkpoint that `--resume PATH` names: itself, or the newest of a run directory."""
    if not path.is_dir():
        raise UserError(f"--resume {path} is not a directory. Give a step-* or a run directory.")
    found = complete(path.parent) if path.name.startswith("step-") else complete(path)
    if not path.name.startswith("step-"):
        newest = newest_good(path, ranks)
        if newest is None:
            raise UserError(f"--resume {path} has no complete checkpoint. Give another directory.")
        return newest
    if path.resolve() not in [p.resolve() for p in found]:
        raise UserError(f"--resume {path} is not a complete checkpoint. Give another step-*.")
    if path.parent.resolve() == out_dir.resolve() and path.resolve() != found[0].resolve():
        raise UserError(
            f"--resume {path} is not the newest checkpoint of its run ({found[0].name}), and going "
            "on from it there would overwrite later ones. Fork it into a new directory.",
            {"--out_dir": next_free(out_dir)},
        )
    return path

"""Checkpoints written while training goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.checkpoint import store
from gristmill.checkpoint.mirror import Mirror
from gristmill.checkpoint.ranks import ALONE, Ranks, reason
from gristmill.checkpoint.staging import Staging, in_place
from gristmill.checkpoint.state import model_state, optimizer_state
from gristmill.checkpoint.store import FileDigest
from gristmill.checkpoint.torch_dcp import quiet_single_process
from gristmill.checkpoint.writer import write_tensors
from gristmill.config.model import ModelConfig
from gristmill.tokenizer import sidecar
from gristmill.util.errors import RunError, UserError

# The last one names the ids that end a text.
TOKENIZER_FILES = (*sidecar.FILES, "generation_config.json")
# Kept free on the disk beyond the checkpoint itself, so that metrics can still be written.
SPARE_BYTES = 16 << 20

Parts = dict[str, dict[str, Tensor]]
"""Tables of tensors, of the weights and of the optimizer."""


class Checkpointer:
    """Writes `out_dir/step-*` in a thread of its own and removes those no longer wanted.

    A save that fails prints one line, sets `failed` and leaves older checkpoints alone; the next
    one tries again. Of several `ranks` each writes its part; it fails on all when it fails on one.

    keep_last: newest checkpoints that stay, at least 2. keep_every: those whose step is a multiple
    stay as well. trained_only: the parameters that are not trained are left out. files: small ones
    that each checkpoint gets beside its own. mirror: where they are copied to. Later steps than
    the one saved are left alone (`discard_after` drops them).
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        config: ModelConfig,
        tokenizer_dir: Path | None = None,
        ranks: Ranks = ALONE,
        trained_only: bool = False,
        files: Mapping[str, str] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        if keep_last < 2:
            raise UserError(
                f"train.keep_last is {keep_last}, but two checkpoints always stay. "
                "Set --train.keep_last 2 or more."
            )
        if keep_every is not None and keep_every < 1:
            raise UserError(
                f"train.keep_every is {keep_every}, not a number of steps. "
                "Set --train.keep_every 1 or more, or leave it out."
            )
        self.failed = False
        self._out_dir = Path(out_dir)
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._config = config
        self._tokenizer_dir = tokenizer_dir
        self._ranks = ranks
        self._trained_only = trained_only
        self._files = dict(files or {})
        self._mirror = mirror if ranks.is_main else None
        self._staging = {"weights": Staging(), "optimizer": Staging()}
        self._thread: threading.Thread | None = None
        quiet_single_process()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any],
        *,
        last: bool = False,
    ) -> None:
        """Start to save; returns when the state is copied, and first waits for the last save.

        record: what the caller needs to go on, as plain JSON values; it is copied. The keys
        `format`, `step`, `optimizer`, `files` and `xxh3` are the checkpoint's own.

        last: nothing changes the model or the optimizer before `wait`, so what lies in CPU memory
        is written from there: a copy would be the peak of many a run.
        """
        self.wait()
        record = json.loads(json.dumps(record))
        record |= {"step": step, "optimizer": type(optimizer).__name__}
        state = {
            "weights": model_state(model, trained_only=self._trained_only),
            "optimizer": optimizer_state(model, optimizer),
        }
        staged = {
            kind: in_place(tensors) if last else self._staging[kind].copy(tensors)
            for kind, tensors in state.items()
        }
        self._thread = threading.Thread(
            target=self._run,
            name=f"checkpoint-{step}",
            args=(step, state, staged, record),
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the save under way, if any, has ended; see `failed` for how."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def discard_after(self, step: int) -> None:
        """Drop later checkpoints, and their copies: a run that went back must not find them."""
        store.discard_after(self._out_dir, step)
        if self._mirror is not None:
            self._mirror.sync()

    def close(self) -> None:
        """Wait for the save under way, and for the copies of what is there.

        Raises RunError when the last of these failed.
        """
        self.wait()
        if self._mirror is not None:
            self._mirror.close()
            if self._mirror.failed:
                raise RunError(
                    f"the run in {self._out_dir} is whole, but its copy is not "
                    f"({self._mirror.failed}). The same command copies again."
                )

    def _run(self, step: int, state: Parts, staged: Parts, record: dict[str, Any]) -> None:
        path = target = store.step_path(self._out_dir, step)
        try:
            num_bytes = sum(self._ranks.gather(_num_bytes(staged)))
            target = self._ranks.main_does(lambda: self._make_room(path, num_bytes))
            self._write(target, state, staged, record)
        except Exception as error:  # whatever it was, training is worth more than this checkpoint
            self.failed = True
            if self._ranks.is_main:
                if not (target / store.RECORD_NAME).exists():  # a complete one is never thrown away
                    shutil.rmtree(target, ignore_errors=True)
                store.say(
                    f"{path.name} was not saved: {reason(error)}. Training goes on with the "
                    f"earlier checkpoints in {self._out_dir}; the next save tries again."
                )
            return
        if self._ranks.is_main:
            try:
                self._retire(step)
            except OSError as error:
                store.say(f"an old checkpoint could not be removed: {reason(error)}.")
        if self._mirror is not None:
            self._mirror.sync()

    def _make_room(self, path: Path, num_bytes: int) -> Path:
        """The empty directory to write to; OSError before filling a disk that others use too."""
        self._out_dir.mkdir(parents=True, exist_ok=True)
        target = path
        if (path / store.RECORD_NAME).exists():
            target = store.replacement_path(path)
        if target.exists():
            store.remove(target)
        needed, free = SPARE_BYTES + num_bytes, shutil.disk_usage(self._out_dir).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        target.mkdir()
        return target

    def _write(self, target: Path, state: Parts, staged: Parts, record: dict[str, Any]) -> None:
        mine: dict[str, FileDigest] = {}
        for kind in state:
            if state[kind]:
                digests = write_tensors(target / kind, state[kind], staged[kind], self._ranks)
                mine |= {f"{kind}/{name}": digest for name, digest in digests.items()}
        # The digests are of memory; this is the comparison with what the disk gives back.
        parts = self._ranks.together(lambda: _checked(target, mine))
        files = {name: digest for part in parts for name, digest in part.items()}
        self._ranks.main_does(lambda: self._conclude(target, files, record))

    def _conclude(self, target: Path, files: dict[str, FileDigest], record: dict[str, Any]) -> None:
        """Add what is common to all parts, and last the record."""
        for name in files:
            if not (target / name).is_file():
                raise OSError(
                    f"{name}, which another rank wrote, is not seen from rank 0: the run's "
                    "directory must be on a disk that all machines share"
                )
        config = json.dumps({"gristmill": 1, **asdict(self._config)}, indent=2)
        small = {"config.json": _write_small(target / "config.json", config.encode())}
        if self._tokenizer_dir is not None:
            (target / "tokenizer").mkdir()
            for name in TOKENIZER_FILES:
                source = self._tokenizer_dir / name
                if source.is_file():
                    copy = target / "tokenizer" / name
                    small[f"tokenizer/{name}"] = _write_small(copy, source.read_bytes())
        for name, text in self._files.items():
            (target / name).parent.mkdir(exist_ok=True)
            small[name] = _write_small(target / name, text.encode())
        if (target / "tokenizer").is_dir():
            store.sync_dir(target / "tokenizer")
        store.write_record(target, record, files | _checked(target, small))
        if target.name.endswith(store.REPLACEMENT_SUFFIX):
            store.promote(target)

    def _retire(self, step: int) -> None:
        past = [p for p in store.complete(self._out_dir) if store.step_of(p) <= step]
        for path in past[self._keep_last :]:
            if self._keep_every is None or store.step_of(path) % self._keep_every:
                store.remove(path)


def _write_small(file: Path, content: bytes) -> FileDigest:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return store.digest_file(file)


def _checked(target: Path, files: dict[str, FileDigest]) -> dict[str, FileDigest]:
    for name, digest in files.items():
        store.check_file(target / name, digest)
    return files


def _num_bytes(staged: Parts) -> int:
    return sum(t.nbytes for part in staged.values() for t in part.values())

"""Checkpoints written while training goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.checkpoint import store
from gristmill.checkpoint.staging import Staging
from gristmill.checkpoint.state import model_state, optimizer_state
from gristmill.checkpoint.store import FileDigest
from gristmill.checkpoint.torch_dcp import quiet_single_process
from gristmill.checkpoint.writer import write_tensors
from gristmill.config.model import ModelConfig
from gristmill.tokenizer import sidecar
from gristmill.util.errors import UserError

# The last one names the ids that end a text.
TOKENIZER_FILES = (*sidecar.FILES, "generation_config.json")
# Kept free on the disk beyond the checkpoint itself, so that metrics can still be written.
SPARE_BYTES = 16 << 20


class Checkpointer:
    """Writes `out_dir/step-*` in a thread of its own and removes those no longer wanted.

    A save that fails prints one line, sets `failed` and leaves older checkpoints alone; the next
    one tries again.

    keep_last: newest checkpoints that stay, at least 2. keep_every: those whose step is a multiple
    stay as well. Later steps than the one saved are left alone (`store.discard_after` drops them).
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        config: ModelConfig,
        tokenizer_dir: Path | None = None,
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
        self._staging = {"weights": Staging(), "optimizer": Staging()}
        self._thread: threading.Thread | None = None
        quiet_single_process()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any],
    ) -> None:
        """Start to save; returns when the state is copied, and first waits for the last save.

        record: what the caller needs to go on, as plain JSON values; it is copied. The keys
        `format`, `step`, `optimizer`, `files` and `xxh3` are the checkpoint's own.
        """
        self.wait()
        record = json.loads(json.dumps(record))
        record |= {"step": step, "optimizer": type(optimizer).__name__}
        state = {
            "weights": model_state(model),
            "optimizer": optimizer_state(model, optimizer),
        }
        staged = {kind: self._staging[kind].copy(tensors) for kind, tensors in state.items()}
        self._thread = threading.Thread(
            target=self._run,
            name=f"checkpoint-{step}",
            args=(step, lambda target: self._write(target, state, staged, record)),
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the save under way, if any, has ended; see `failed` for how."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, write: Callable[[Path], None]) -> None:
        path = store.step_path(self._out_dir, step)
        target = path
        try:
            self._out_dir.mkdir(parents=True, exist_ok=True)
            if (path / store.RECORD_NAME).exists():
                target = store.replacement_path(path)
            if target.exists():
                store.remove(target)
            write(target)
            if target != path:
                store.promote(target)
        except Exception as error:  # whatever it was, training is worth more than this checkpoint
            self.failed = True
            if not (target / store.RECORD_NAME).exists():  # a complete one is never thrown away
                shutil.rmtree(target, ignore_errors=True)
            store.say(
                f"{path.name} was not saved: {_reason(error)}. Training goes on with the earlier "
                f"checkpoints in {self._out_dir}; the next save tries again."
            )
            return
        try:
            self._retire(step)
        except OSError as error:
            store.say(f"an old checkpoint could not be removed: {_reason(error)}.")

    def _write(
        self,
        target: Path,
        state: dict[str, dict[str, Tensor]],
        staged: dict[str, dict[str, Tensor]],
        record: dict[str, Any],
    ) -> None:
        self._check_space(staged)
        target.mkdir()
        files: dict[str, FileDigest] = {}
        for kind in state:
            if state[kind]:
                digests = write_tensors(target / kind, state[kind], staged[kind])
                files |= {f"{kind}/{name}": digest for name, digest in digests.items()}
        config = json.dumps({"gristmill": 1, **asdict(self._config)}, indent=2)
        files["config.json"] = _write_small(target / "config.json", config.encode())
        if self._tokenizer_dir is not None:
            (target / "tokenizer").mkdir()
            for name in TOKENIZER_FILES:
                source = self._tokenizer_dir / name
                if source.is_file():
                    copy = target / "tokenizer" / name
                    files[f"tokenizer/{name}"] = _write_small(copy, source.read_bytes())
            store.sync_dir(target / "tokenizer")
        # The digests are of memory; this is the comparison with what the disk gives back.
        for name, digest in files.items():
            store.check_file(target / name, digest)
        store.write_record(target, record, files)

    def _check_space(self, staged: dict[str, dict[str, Tensor]]) -> None:
        """Fail before filling a disk that others write to as well."""
        needed = SPARE_BYTES + sum(t.nbytes for part in staged.values() for t in part.values())
        free = shutil.disk_usage(self._out_dir).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")

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


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.rstrip(".")

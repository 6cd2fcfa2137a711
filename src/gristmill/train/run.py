"""The life of a run around its steps: directory, lock, signals, trackers, checkpoints, the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn

from gristmill import __version__
from gristmill.checkpoint.save import Checkpointer
from gristmill.checkpoint.store import clean_partial, discard_after, read_record
from gristmill.data.reading.corpus import MANY_EPOCHS
from gristmill.models.counts import num_parameters
from gristmill.models.device import describe
from gristmill.track.console import Console, count, duration
from gristmill.track.tracker import Trackers, open_trackers
from gristmill.train import directory
from gristmill.train.settle import Job
from gristmill.train.step import StepStats
from gristmill.util.errors import RunError, UserError
from gristmill.util.named import load_named

SAVE_SECONDS = 600.0
"""A checkpoint is due after this much time, whatever the step interval."""


FINGERPRINT_MEANS = {
    "version": "the gristmill that wrote it ordered samples in another way",
    "dataset_id": "the data is other data",
    "seq_len": "samples have another length, so their numbers mean other text",
    "seed": "the shuffle is another",
    "shuffle": "the order is another",
    "mixture": "sources take turns in another way",
    "packing": "rows are put together in another way",
    "spread": "rows of a batch are in another order",
}
"""What follows from a change of each part of a stream's fingerprint."""


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


@dataclass
class State:
    """Progress of a run; with weights and optimizer, all that a checkpoint holds."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    train_time_s: float = 0.0
    skipped_steps: int = 0


class Run:
    """A context in which one process owns the run directory and is told of signals.

    A hook sees `state`, `job`, `model` and `optimizer`, and may change the last two.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, job: Job) -> None:
        """Nothing is written before the context is entered."""
        self.job = job
        self.state = State()
        self.stop_signal: int | None = None
        self._last_save_s = self._last_step_s = time.monotonic()
        self._handlers: dict[int, Any] = {}
        self.last_saved_step: int | None = None
        self.start_from: Path | None = None
        self.own_start = False
        self.trackers: Trackers | None = None

    def __enter__(self) -> Self:
        """Take the directory, find the progress to go on from, catch signals.

        What the directory holds stays as it is until `begin`.
        """
        job, out_dir = self.job, self.job.out_dir
        self._hook = load_named("--hook", job.cfg.hook) if job.cfg.hook else None
        with ExitStack() as undo:
            self._lock = undo.enter_context(directory.lock(out_dir))
            self._find_progress()
            self._prepare()
            undo.pop_all()
        return self

    def _find_progress(self) -> None:
        """Where the run goes on from; under the lock, so that nobody moves it."""
        job, out_dir = self.job, self.job.out_dir
        if job.going_on:
            clean_partial(out_dir)
        self.start_from = directory.start_point(job.cfg, out_dir, going_on=job.going_on)
        if self.start_from is None:
            return
        record = read_record(self.start_from)
        self.state = State(**{f.name: record[f.name] for f in fields(State)})
        self.own_start = self.start_from.parent.resolve() == out_dir.resolve()
        self._check_stream(record["stream"])
        if self.own_start:
            self.last_saved_step = self.state.step
        else:
            self._check_fork()

    def _check_stream(self, earlier: dict[str, Any]) -> None:
        """Refuse a place in another order of samples: some would be read twice, others never."""
        now = self.job.train.fingerprint()
        changed = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
        if not changed:
            return
        shown = "; ".join(
            f"{name} was {_short(earlier.get(name))}, now {_short(now.get(name))}: "
            + FINGERPRINT_MEANS.get(name, "the order is another")
            for name in changed
        )
        raise UserError(
            f"{self.start_from} cannot be gone on from with these settings, because its "
            f"{self.state.samples:,} samples are not the first ones of this run ({shown}). Give "
            "the settings it was trained with, or take only its weights.",
            {"--resume": None, "--initial_checkpoint_dir": self.start_from},
        )

    def _check_fork(self) -> None:
        job = self.job
        if self.state.step >= job.length.total_steps:
            raise UserError(
                f"{self.start_from} is at step {self.state.step:,} and this run would have "
                f"{job.length.total_steps:,} steps: nothing is left to train. Set a larger limit, "
                "such as --train.max_steps.",
                {"--train.max_steps": 2 * self.state.step},
            )

    def begin(self) -> None:
        """Write for the first time: every check is passed and a dry run has worked."""
        job, out_dir = self.job, self.job.out_dir
        if job.cfg.overwrite:
            directory.clear(out_dir)
        elif self.start_from is not None and self.own_start:
            # Later ones are damaged, or they would have been chosen.
            discard_after(out_dir, self.state.step)
        directory.write(out_dir, job.cfg, job.identity, job.length, job.micro_batch_size)
        self.trackers = open_trackers(
            job.cfg.logger_name, out_dir, job.cfg.log, start_step=self.state.step
        )

    def _prepare(self) -> None:
        job, out_dir = self.job, self.job.out_dir
        self.checkpointer = Checkpointer(
            out_dir,
            keep_last=job.cfg.train.keep_last,
            keep_every=job.cfg.train.keep_every,
            config=job.model,
            tokenizer_dir=job.tokenizer_dir,
        )
        self.console = Console(total_steps=job.length.total_steps, start_step=self.state.step)
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        if job.cfg.deterministic:
            # What cuBLAS needs for it; read when it first runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            # Whoever started this process with a signal ignored (nohup) wants it ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give everything back; a checkpoint being written is finished first."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(self._deterministic)
        self.console.close()
        if self.trackers is not None:
            self.trackers.close()
        self.checkpointer.wait()
        self._lock.close()

    def announce(self, how: str) -> None:
        """Show what is about to run; `how` says whether blocks are compiled."""
        job, length = self.job, self.job.length
        batch = f"{length.global_batch_size} x {length.seq_len} tokens"
        if job.micro_batch_size != length.global_batch_size:
            batch += f", {job.micro_batch_size} at a time"
        steps = f"{length.total_steps:,}, {length.warmup_steps:,} of them warm-up"
        if self.state.step:
            steps += f"; going on after step {self.state.step:,} from {self.start_from}"
        if length.max_time_s is not None:
            steps += f"; at most {duration(length.max_time_s)}"
        self.console.start(
            {
                "run": job.out_dir,
                "model": f"{job.model.name}, {count(num_parameters(job.model))} parameters",
                "device": f"{describe(job.device, job.precision)}, {how}",
                "data": self._describe_data(),
                **self._describe_packing(),
                "tokens": f"{length.total_steps * length.step_tokens:,}",
                "batch": batch,
                "steps": steps,
                "schedule": f"{job.cfg.train.schedule} from {job.lr:g} to {job.min_lr:g}",
            }
        )

    def _describe_data(self) -> str:
        """Samples, how often each source will be read, and what is held out."""
        job = self.job
        total = job.length.total_steps * job.length.global_batch_size
        read = dict(zip(job.source_names, job.train.epochs(total), strict=True))
        epochs = f"{read[job.source_names[0]]:.2f} epochs"
        if len(read) > 1:
            epochs = "epochs: " + ", ".join(f"{name} {times:.2f}" for name, times in read.items())
        text = f"{job.train.num_samples:,} samples, {epochs}; validation: "
        text += f"{job.val.num_samples:,} samples" if job.val else "none"
        often = [name for name, times in read.items() if times > MANY_EPOCHS]
        if often and len(read) > 1:
            text += f" (more than {MANY_EPOCHS} epochs of {', '.join(often)}: it may not pay)"
        return text

    def _describe_packing(self) -> dict[str, str]:
        """What best-fit packing makes of each source; nothing when samples are not packed."""
        job, lines = self.job, []
        for name, packed in zip(job.source_names, job.train.packing, strict=False):
            line = f"{100 * packed.padding:.2f} % padding, {packed.cut:,} of {packed.documents:,} "
            line += f"documents ({100 * packed.cut_share:.2f} %) longer than a sample and cut"
            lines.append(line if len(job.source_names) == 1 else f"{name} {line}")
        return {"packing": "; ".join(lines)} if lines else {}

    def done(self) -> bool:
        """Whether there is no step more to make: enough of them, out of time, or told to stop."""
        return self.complete() or self.stop_signal is not None

    def complete(self) -> bool:
        """Whether the run has come to its end by steps or by time."""
        limit = self.job.length.max_time_s
        out_of_time = limit is not None and self.state.train_time_s >= limit
        return out_of_time or self.state.step >= self.job.length.total_steps

    def stopping(self) -> bool:
        """Whether a signal has asked to leave."""
        return self.stop_signal is not None

    def advance(self) -> None:
        """Count the step just made, and the time since the one before it, validation included."""
        now = time.monotonic()
        self.state.step += 1
        self.state.samples += self.job.length.global_batch_size
        self.state.tokens += self.job.length.step_tokens
        self.state.train_time_s += now - self._last_step_s
        self._last_step_s = now

    def call_hook(self, stats: StepStats) -> None:
        """Call the user's function, if there is one. Raises RunError for what goes wrong in it."""
        if self._hook is None:
            return
        try:
            self._hook(self, stats)
        except Exception as error:
            raise RunError(
                f"--hook {self.job.cfg.hook} failed at step {self.state.step:,} "
                f"({type(error).__name__}: {error}). Correct it and run the same command again."
            ) from error

    def validation_due(self) -> bool:
        """Whether to validate after this step: at intervals, and after the last one."""
        if self.job.val is None or self.stop_signal is not None:
            return False
        if self.complete():
            return self.job.cfg.eval.final_validation
        return self.state.step % self.job.length.eval_interval == 0

    def save_due(self) -> bool:
        """Whether a checkpoint is due by steps or by the clock."""
        overdue = time.monotonic() - self._last_save_s >= SAVE_SECONDS
        return overdue or self.state.step % self.job.length.save_interval == 0

    def log(self, row: dict[str, float]) -> None:
        """Write a row of metrics for the present step, where one is due."""
        if self.state.step % self.job.cfg.train.log_interval and "val_loss" not in row:
            return
        row = {"tokens": self.state.tokens, "samples": self.state.samples, **row}
        assert self.trackers is not None, "begin() comes before the first row"
        self.trackers.log(row, self.state.step)
        self.console.log(row, self.state.step)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Stage a checkpoint of this step; it is written while training goes on."""
        self.checkpointer.save(self.state.step, model, optimizer, self._record())
        self._last_save_s = time.monotonic()
        self.last_saved_step = self.state.step

    def _record(self) -> dict[str, Any]:
        return {
            **asdict(self.state),
            "gristmill": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": self.job.device.type,
            "precision": self.job.precision,
            "stream": self.job.train.fingerprint(),
        }

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the loop to save and leave after this step; a second Ctrl-C leaves at once."""
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number
        self.console.note(
            f"{signal.Signals(number).name}: saving after this step (Ctrl-C then leaves at once)"
        )

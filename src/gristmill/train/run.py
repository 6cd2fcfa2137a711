"""The life of a run around its steps: directory, lock, signals, trackers, checkpoints, the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

import torch
from torch import nn

from gristmill import __version__
from gristmill.checkpoint.load import load as load_checkpoint
from gristmill.checkpoint.ranks import ALONE, Ranks
from gristmill.checkpoint.save import Checkpointer
from gristmill.checkpoint.store import clean_partial, read_record
from gristmill.data.reading.stream import Batch
from gristmill.parallel.check import check_mesh
from gristmill.parallel.heartbeat import Heartbeat
from gristmill.parallel.mesh import Mesh, close_mesh, open_mesh
from gristmill.track.console import Console
from gristmill.track.tracker import Trackers, open_trackers
from gristmill.train import directory
from gristmill.train.job import Job
from gristmill.train.length import seconds
from gristmill.train.step import StepStats
from gristmill.train.watch import Watch
from gristmill.util.errors import RunError, UserError
from gristmill.util.named import load_named

MEETING_S = 120.0
"""How long the ranks' first words to each other may take."""
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
    rewinds: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """What the next loss is measured against, where spikes are looked for."""


def progress_of(record: dict[str, Any]) -> State:
    """The progress that a checkpoint's record holds."""
    return State(**{f.name: record[f.name] for f in fields(State) if f.name in record})


class Run:
    """A context in which the ranks of a run decide alike, and rank 0 owns the run directory.

    A hook sees `state`, `job`, `mesh`, `rows` (this rank's part of the batch), `model` and
    `optimizer`, and may change the last two.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mesh: Mesh
    rows: Batch

    def __init__(self, job: Job) -> None:
        """Nothing is written before the context is entered."""
        self.job = job
        self.state = State()
        self.step_tokens = 0
        """Tokens of the step that was made last."""
        self.stop_signal: int | None = None
        """What has asked some rank to leave, once all know of it."""
        self.ranks = ALONE
        self._signal_here = 0
        self._save_overdue = False
        self._lock: IO[str] | None = None
        self._last_save_s = self._last_step_s = time.monotonic()
        self._handlers: dict[int, Any] = {}
        self.last_saved_step: int | None = None
        self.start_from: Path | None = None
        self.own_start = False
        self.trackers: Trackers | None = None
        self.watch: Watch | None = None
        self.heart: Heartbeat | None = None

    def __enter__(self) -> Self:
        """Meet the other ranks, take the directory, find the progress to go on from, catch signals.

        What the directory holds stays as it is until `begin`.
        """
        self._hook = load_named("--hook", self.job.cfg.hook) if self.job.cfg.hook else None
        with ExitStack() as undo:
            stall_s = seconds(self.job.cfg.stall_timeout, "--stall_timeout")
            # Who waits for the others hears from the heartbeat, earlier, who they are.
            self.timeout_s = 2 * stall_s + MEETING_S
            self.mesh = open_mesh(self.job.cfg.parallel, self.job.device, timeout_s=self.timeout_s)
            self.ranks = Ranks.open()
            self._settle_alike()
            self.ranks.main_does(self._take_lock)
            if self._lock is not None:
                undo.enter_context(self._lock)
            self._find_progress()
            self._prepare()
            undo.pop_all()
        return self

    def _settle_alike(self) -> None:
        """Make one job of what each rank has found in files; UserError where it is not one."""
        job, mesh = self.job, self.mesh
        mine = (job.identity, job.train.fingerprint())
        files = (job.out_dir, job.going_on, job.length, job.micro_batch_size)
        theirs, (out_dir, going_on, length, micro) = self.ranks.main_says((mine, files))
        self.ranks.together(lambda: _check_same(theirs, mine))
        check_mesh(job.model, mesh.sizes, seq_len=length.seq_len)
        batch = length.global_batch_size
        if mesh.data_world > batch:
            raise UserError(
                f"{mesh.data_world} devices share batches of {batch} samples, and some would have "
                "none. Use a larger batch or fewer devices.",
                {"--train.global_batch_size": mesh.data_world},
            )
        self.micro_batch_size = micro
        self.job = replace(
            job,
            out_dir=out_dir,
            going_on=going_on,
            length=length,
            micro_batch_size=min(micro, -(-batch // mesh.data_world)),
        )

    def _take_lock(self) -> None:
        self._lock = directory.lock(self.job.out_dir)

    def _find_progress(self) -> None:
        """Where the run goes on from; under the lock, so that nobody moves it."""
        job, out_dir = self.job, self.job.out_dir
        if job.going_on:
            self.ranks.main_does(lambda: clean_partial(out_dir))
        self.start_from = directory.start_point(
            job.cfg, out_dir, going_on=job.going_on, ranks=self.ranks
        )
        if self.start_from is None:
            return
        record = read_record(self.start_from)
        self.state = progress_of(record)
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
        self.watch = Watch(self)
        self.ranks.main_does(self._begin_writing)
        stall_s = seconds(self.job.cfg.stall_timeout, "--stall_timeout")
        self.heart = Heartbeat(self.mesh, stall_s)

    def _begin_writing(self) -> None:
        job, out_dir = self.job, self.job.out_dir
        if job.cfg.overwrite:
            directory.clear(out_dir, job.cfg.remote_dir)
        elif self.start_from is not None and self.own_start:
            # Later ones are damaged, or they would have been chosen.
            self.checkpointer.discard_after(self.state.step)
        directory.write(out_dir, job.cfg, job.identity, job.length, self.micro_batch_size)
        self.open_trackers()

    def open_trackers(self) -> None:
        """Open the trackers after the present step, rank 0 alone; rows of later steps go."""
        if self.trackers is not None:
            self.trackers.close()
        job = self.job
        self.trackers = open_trackers(
            job.cfg.logger_name, job.out_dir, job.cfg.log, start_step=self.state.step
        )

    def _prepare(self) -> None:
        job, out_dir = self.job, self.job.out_dir
        self.checkpointer = Checkpointer(
            out_dir,
            keep_last=job.cfg.train.keep_last,
            keep_every=job.cfg.train.keep_every,
            config=job.model,
            tokenizer_dir=job.tokenizer_dir,
            ranks=Ranks.open(),
            trained_only=job.method.trained_only,
            mirror=directory.mirror_of(job.cfg, out_dir),
            files=job.method.files(job)
            | {f"tokenizer/{name}": text for name, text in job.tokenizer_files.items()},
        )
        self.console = Console(
            total_steps=job.length.total_steps,
            start_step=self.state.step,
            stream=None if self.mesh.is_main else open(os.devnull, "w"),  # noqa: SIM115
        )
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
        if self.heart is not None:
            self.heart.close()
        if self.watch is not None:
            if error is None:
                self.checkpointer.wait()  # the last one is looked at too
            self.watch.close(finished=error is None)
        self.console.close()
        if self.trackers is not None:
            self.trackers.close()
        self.checkpointer.wait()
        if self._lock is not None:
            self._lock.close()
        if error is None:  # else the others may be gone, and would be waited for
            close_mesh(self.mesh)

    def done(self) -> bool:
        """Whether there is no step more to make: enough of them, out of time, or told to stop."""
        return self.complete() or self.stopping()

    def complete(self) -> bool:
        """Whether the run has come to its end by steps, by time or by its data."""
        limit = self.job.length.max_time_s
        out_of_time = limit is not None and self.state.train_time_s >= limit
        return out_of_time or self.out_of_data or self.state.step >= self.job.length.total_steps

    @property
    def out_of_data(self) -> bool:
        """Whether one more batch would read a source too often; only rewinds let it come so far."""
        most = self.job.most_samples
        after = self.state.samples + self.job.length.global_batch_size
        return most is not None and after > most

    def stopping(self) -> bool:
        """Whether a signal has asked any rank to leave; all ranks ask at the same time."""
        self.beat(f"step {self.state.step + 1:,}")
        if self.stop_signal is None:
            self._stop_for(*self.ranks.largest(self._signal_here))
        return self.stop_signal is not None

    def beat(self, what: str, *, patient: bool = False) -> None:
        """Tell whoever watches over stalled ranks that this one has come to `what`."""
        if self.heart is not None:
            self.heart.beat(what, patient=patient)

    def advance(self) -> None:
        """Count the step just made, and the time since the one before it, validation included."""
        now = time.monotonic()
        self.state.step += 1
        batch = self.job.length.global_batch_size
        self.step_tokens = self.job.train.num_tokens(self.state.samples, batch)
        self.state.samples += batch
        self.state.tokens += self.step_tokens
        self.state.train_time_s += now - self._last_step_s
        self._last_step_s = now
        self._agree()

    def _agree(self) -> None:
        """Take over what hangs on time from rank 0, and a signal from whoever has it."""
        time_s = overdue = 0.0
        if self.mesh.is_main:
            time_s = self.state.train_time_s
            overdue = float(time.monotonic() - self._last_save_s >= SAVE_SECONDS)
        number, time_s, overdue = self.ranks.largest(self._signal_here, time_s, overdue)
        self.state.train_time_s, self._save_overdue = time_s, bool(overdue)
        self._stop_for(number)

    def _stop_for(self, number: float) -> None:
        if number and self.stop_signal is None:
            self.stop_signal = int(number)
            if not self._signal_here:
                self._note_signal(self.stop_signal)

    def before_step(self) -> None:
        """Tell those who look at the run that a step begins."""
        assert self.watch is not None, "begin() comes before the first step"
        self.watch.before_step()

    def after_step(self) -> None:
        """Let those who look at the run see the model; they do not change it."""
        assert self.watch is not None, "begin() comes before the first step"
        self.watch.after_step()

    def call_hook(self, stats: StepStats) -> None:
        """Call the user's function, if there is one. Raises RunError for what goes wrong in it."""
        if self._hook is None:
            return
        self.beat(f"the hook of step {self.state.step:,}")
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
        return self._save_overdue or self.state.step % self.job.length.save_interval == 0

    def log(self, row: dict[str, float]) -> None:
        """Write a row of metrics for the present step, where one is due."""
        if self.state.step % self.job.cfg.train.log_interval and "val_loss" not in row:
            return
        row = {"tokens": self.state.tokens, "samples": self.state.samples, **row}
        if not self.mesh.is_main:
            return
        assert self.trackers is not None, "begin() comes before the first row"
        self.trackers.log(row, self.state.step)
        self.console.log(row, self.state.step)

    def save(self, *, last: bool = False) -> None:
        """Start a checkpoint of this step; it is written while training goes on, if it does."""
        self.beat(f"the checkpoint of step {self.state.step:,}", patient=True)
        self.checkpointer.save(
            self.state.step, self.model, self.optimizer, self._record(), last=last
        )
        self._last_save_s = time.monotonic()
        self.last_saved_step = self.state.step

    def load(self, path: Path) -> None:
        """Put a checkpoint that was found to be good into model and optimizer."""
        load_checkpoint(
            path,
            self.model,
            self.optimizer,
            verified=True,
            ranks=self.ranks,
            trained_only=self.job.method.trained_only,
        )

    def _record(self) -> dict[str, Any]:
        return {
            **asdict(self.state),
            "gristmill": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "world": self.mesh.world,
            "device": self.job.device.type,
            "precision": self.job.precision,
            "stream": self.job.train.fingerprint(),
        }

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the loop to save and leave after this step; a second Ctrl-C leaves at once."""
        if self._signal_here and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal_here = number
        self._note_signal(number)

    def _note_signal(self, number: int) -> None:
        self.console.note(
            f"{signal.Signals(number).name}: saving after this step (Ctrl-C then leaves at once)"
        )


def _check_same(first: tuple[dict[str, Any], ...], mine: tuple[dict[str, Any], ...]) -> None:
    """Raise UserError where a rank has other settings or other data than rank 0."""
    for theirs, ours in zip(first, mine, strict=True):
        changed = directory.differences(theirs, ours)
        if changed:
            raise UserError(
                f"not all ranks have the same settings and data ({'; '.join(changed)}). Start all "
                "with the same command, and give them the same files."
            )

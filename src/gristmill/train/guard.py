"""What happens when a loss is not a number or far above the last ones: skip, go back, or stop.

A bad step's update is left out on the device, on all ranks alike: they have summed the same loss
and know the same limit before the step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gristmill.checkpoint.load import newest_good
from gristmill.checkpoint.store import complete, read_record, step_of
from gristmill.config.sections import StepArgs
from gristmill.train.run import Run, progress_of
from gristmill.train.spikes import most_loss, remember
from gristmill.train.step import StepStats
from gristmill.util.errors import RunError

MAX_REWINDS = 3
"""How often a run goes back to one and the same step."""


class Guard:
    """Counts steps in a row whose update was left out, and ends a run that does not recover."""

    def __init__(self, train: StepArgs) -> None:
        """Tolerate fewer than `train.max_bad_steps` such steps in a row."""
        self.train = train
        self.in_a_row = 0
        self._went_back_to: list[int] = []

    def most_loss(self, run: Run) -> float:
        """The largest loss for which the next step updates the model."""
        return most_loss(self.train, run.state.recent_losses)

    def check(self, stats: StepStats, run: Run) -> bool:
        """Take note of a step; whether the run has gone back to an earlier one for it.

        Raises RunError after too many bad steps, or a spike where that was asked for, naming the
        way back.
        """
        if stats.finite and not stats.spike:
            self.in_a_row = 0
            losses = remember(self.train, run.state.recent_losses, stats.loss)
            run.state.recent_losses = losses
            return False
        self.in_a_row += 1
        run.state.skipped_steps += 1
        step = run.state.step
        what = f"step {step}: loss {stats.loss}, gradient norm {stats.grad_norm}"
        if stats.spike:
            what = f"step {step}: the loss {stats.loss:.4f} is a spike"
            what += f" (above {most_loss(self.train, run.state.recent_losses):.4f})"
        if stats.spike and self.train.on_spike == "stop":
            run.checkpointer.wait()
            raise RunError(f"{what}. {_way_on(run)}")
        if stats.spike and self.train.on_spike == "rewind" and self._rewind(run, what):
            return True
        run.console.note(f"{what}; the update was skipped")
        if self.in_a_row < self.train.max_bad_steps:
            return False
        good = next(iter(complete(run.job.out_dir)), None)
        back = (
            f"The last good checkpoint is {good}; go on from it with a lower learning rate: "
            f"--initial_checkpoint_dir {good} --out_dir NEW --optimizer.lr {run.job.lr / 2:g}."
            if good
            else f"Start again with a lower learning rate: --optimizer.lr {run.job.lr / 2:g}."
        )
        kind = "a spike or no number" if stats.spike else "not finite"
        raise RunError(
            f"the loss or gradient was {kind} in {self.in_a_row} steps in a row "
            f"(up to step {step}). {back}"
        )

    def _rewind(self, run: Run, what: str) -> bool:
        """Go back to the last checkpoint, and on from there with the data after this step's.

        False where there is no checkpoint yet. That data was passed over is saved at once, in the
        checkpoint's place, so that whoever goes on from it reads on behind it too.
        """
        run.beat("going back after a spike", patient=True)
        run.checkpointer.wait()
        path = newest_good(run.job.out_dir, run.ranks) or run.start_from
        if path is None:
            run.console.note(f"{what}; there is no checkpoint to go back to")
            return False
        back = step_of(path)
        self._went_back_to = [s for s in self._went_back_to if s == back] + [back]
        if len(self._went_back_to) > MAX_REWINDS:
            raise RunError(
                f"{what}, the {len(self._went_back_to)}th after going back to {path}. Other data "
                "does not help: go on from it with a lower learning rate: --initial_checkpoint_dir "
                f"{path} --out_dir NEW --optimizer.lr {run.job.lr / 2:g}."
            )
        run.load(path)
        then, now = progress_of(read_record(path)), run.state
        run.state = replace(
            now,
            step=then.step,
            tokens=then.tokens,
            recent_losses=then.recent_losses,
            rewinds=now.rewinds + 1,
        )
        passed = now.samples - then.samples
        run.console.note(
            f"{what}; back to step {then.step:,}, passing over the {passed:,} samples since"
        )
        run.ranks.main_does(run.open_trackers)
        run.save()
        self.in_a_row = 0
        return True


def _way_on(run: Run) -> str:
    good: Path | None = next(iter(complete(run.job.out_dir)), None)
    on = "--train.on_spike skip leaves such updates out, rewind goes on with other data"
    if good is None:
        return f"There is no checkpoint yet. {on}."
    return f"The last checkpoint is {good}. {on}: run the same command again with one of them."

"""What happens when a loss or gradient is not a number: skip, count, and stop in time."""

from __future__ import annotations

from gristmill.checkpoint.store import complete
from gristmill.train.run import Run
from gristmill.train.step import StepStats
from gristmill.util.errors import RunError


class Guard:
    """Counts steps in a row whose update was skipped, and ends a run that does not recover."""

    def __init__(self, max_bad_steps: int) -> None:
        """Tolerate fewer than `max_bad_steps` such steps in a row."""
        self.max_bad_steps = max_bad_steps
        self.in_a_row = 0

    def check(self, stats: StepStats, run: Run) -> None:
        """Take note of a step. Raises RunError after too many bad ones, naming the way back."""
        if stats.finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        run.state.skipped_steps += 1
        run.console.note(
            f"step {run.state.step}: loss {stats.loss}, gradient norm {stats.grad_norm}; "
            "the update was skipped"
        )
        if self.in_a_row < self.max_bad_steps:
            return
        good = next(iter(complete(run.job.out_dir)), None)
        back = (
            f"The last good checkpoint is {good}; go on from it with a lower learning rate: "
            f"--initial_checkpoint_dir {good} --out_dir NEW --optimizer.lr {run.job.lr / 2:g}."
            if good
            else f"Start again with a lower learning rate: --optimizer.lr {run.job.lr / 2:g}."
        )
        raise RunError(
            f"the loss or gradient was not finite in {self.in_a_row} steps in a row "
            f"(up to step {run.state.step}). {back}"
        )

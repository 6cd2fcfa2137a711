"""Weights & Biases: one run of it per run directory, however often that is restarted."""

from __future__ import annotations

from html import escape
from pathlib import Path

from gristmill.track.metrics import Row


class WeightsAndBiases:
    """Sends rows to the run `number`, which a restart joins.

    Steps it already has are not taken twice. The key is the package's own affair (`wandb login`,
    WANDB_API_KEY, WANDB_MODE=offline). Raises ImportError without the package, and the package's
    own errors when it does not start.
    """

    def __init__(
        self, out_dir: Path, number: str, project: str, run: str, group: str | None
    ) -> None:
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=project,
            name=run,
            group=group,
            dir=str(out_dir),
            id=number,
            resume="allow",
        )

    def log(self, row: Row, step: int) -> None:
        """Send a row."""
        self._run.log(dict(row), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Send a text as it is written."""
        self._run.log({name: self._html(f"<pre>{escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """Send what is left and end the run."""
        self._run.finish()

"""Weights & Biases: one run of it per run directory, however often that is restarted."""

from __future__ import annotations

import uuid
from pathlib import Path

from gristmill.config.sections import LogArgs
from gristmill.track.metrics import Row
from gristmill.util.errors import UserError

ID_FILE = "wandb_id"


class WeightsAndBiases:
    """Sends rows to a run whose id is kept in `out_dir/wandb_id`.

    A restart joins that run; steps it already has are not taken twice. The key is the package's
    own affair (`wandb login`, WANDB_API_KEY, WANDB_MODE=offline). Raises UserError when the
    package is not installed or refuses to start.
    """

    def __init__(self, out_dir: Path, log: LogArgs) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "--logger_name wandb needs the package wandb. "
                "Install it: pip install 'gristmill[wandb]'."
            ) from None
        try:
            self._run = wandb.init(
                project=log.project or "gristmill",
                name=log.run or out_dir.resolve().name,
                group=log.group,
                dir=str(out_dir),
                id=_run_id(out_dir),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb did not start a run ({error}). "
                "Log in with `wandb login`, or set WANDB_MODE=offline."
            ) from None

    def log(self, row: Row, step: int) -> None:
        """Send a row."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Send what is left and end the run."""
        self._run.finish()


def _run_id(out_dir: Path) -> str:
    file = out_dir / ID_FILE
    if file.exists():
        return file.read_text().strip()
    run_id = uuid.uuid4().hex[:12]
    file.write_text(run_id + "\n")
    return run_id

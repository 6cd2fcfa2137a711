"""TensorBoard event files, in `out_dir/tensorboard`."""

from __future__ import annotations

from pathlib import Path

from gristmill.track.metrics import Row
from gristmill.util.errors import UserError


class TensorBoard:
    """Writes each metric as a scalar; steps after `start_step` of an earlier start are hidden.

    Raises UserError when the package is not installed.
    """

    def __init__(self, out_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--logger_name tensorboard needs the package tensorboard. "
                "Install it: pip install 'gristmill[tensorboard]'."
            ) from None
        self._writer = SummaryWriter(
            str(out_dir / "tensorboard"), purge_step=start_step + 1 if start_step else 0
        )

    def log(self, row: Row, step: int) -> None:
        """Add a row and hand it to the system, so that a kill does not lose it."""
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

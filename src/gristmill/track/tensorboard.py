"""TensorBoard event files, in `out_dir/tensorboard`."""

from __future__ import annotations

from pathlib import Path

from gristmill.track.metrics import Row


class TensorBoard:
    """Writes each metric as a scalar; steps after `start_step` of an earlier start are hidden.

    Raises ImportError when the package is not installed.
    """

    def __init__(self, out_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(out_dir / "tensorboard"), purge_step=start_step + 1 if start_step else 0
        )

    def log(self, row: Row, step: int) -> None:
        """Add a row and hand it to the system, so that a kill does not lose it."""
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text; four spaces make it what the page shows unchanged."""
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

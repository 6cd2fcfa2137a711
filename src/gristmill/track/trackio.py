"""trackio: one run of it per run directory, however often that is restarted."""

from __future__ import annotations

from gristmill.track.metrics import Row


class Trackio:
    """Sends rows to a run that a restart joins by its name.

    Where runs are kept, and the key for a Space, are the package's own affair (TRACKIO_SPACE_ID,
    HF_TOKEN). Raises ImportError without the package.
    """

    def __init__(self, project: str, run: str, group: str | None) -> None:
        import trackio

        self._trackio = trackio
        options = {} if group is None else {"group": group}
        trackio.init(project=project, name=run, resume="allow", **options)

    def log(self, row: Row, step: int) -> None:
        """Send a row."""
        self._trackio.log(dict(row), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Send a text as a table of one cell, which keeps its line breaks."""
        self._trackio.log({name: self._trackio.Table(columns=["text"], data=[[text]])}, step=step)

    def close(self) -> None:
        """Send what is left and end the run."""
        self._trackio.finish()

"""Who runs the units. Each executor has the same function:

    run(task, units, settings, on_progress) -> list[Failure]

`local` is processes of this machine, `array` one of many such machines, `ray` a Ray cluster. They
share `work.Work`, which runs one unit anywhere. Who runs a unit cannot be seen in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gristmill.data.preparation.units import Progress
    from gristmill.data.raw.documents import OnError

MAX_DEATHS = 3
"""A unit whose worker died this often is left out; the others go on."""


@dataclass(frozen=True)
class Task:
    """What a worker must know to run units: the rest is in the workspace of `out`. It pickles."""

    out: str
    """Folder or URL of the output."""
    root: str
    """Folder or URL that the inputs' places are relative to."""
    on_error: OnError = "skip"


@dataclass(frozen=True)
class Failure:
    """A unit that could not be done, and why. The others are done all the same."""

    unit: int
    message: str


OnProgress = Callable[[int, "Progress"], None]


def death(unit: int, how: str) -> Failure:
    """The failure of a unit whose worker died `MAX_DEATHS` times, last as `how` says."""
    return Failure(
        unit,
        f"its worker died {MAX_DEATHS} times ({how}; -9 often means that memory ran out). "
        "run the same command again with fewer workers.",
    )

"""The processes that save and load a checkpoint together, on a process group of their own.

Its collectives may run in a thread beside those of training: on one group they would get mixed up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class OtherRankError(Exception):
    """What went wrong on another rank, in words."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; alone by default."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def open(cls, timeout_s: float | None = None) -> Ranks:
        """The ranks of the process group that is open, if one is; all of them must call it."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks and writes what is common."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What every rank says, in order of rank, known to all."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, *values: float) -> list[float]:
        """The largest that any rank says, of each value."""
        if self.world == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group)
        return box.tolist()

    def main_says(self, value: T) -> T:
        """What rank 0 says."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank: all get all results, or all raise when one has failed.

        A rank that has failed raises its own error, the others an OtherRankError.
        """
        if self.world == 1:
            return [work()]
        error: Exception | None = None
        outcome: tuple[Any, str | None] = (None, None)
        try:
            outcome = work(), None
        except Exception as mine:
            error, outcome = mine, (None, reason(mine))
        outcomes = self.gather(outcome)
        if error is not None:
            raise error
        for rank, (_, said) in enumerate(outcomes):
            if said is not None:
                raise OtherRankError(f"rank {rank}: {said}")
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def main_does(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone: all get its result, or all raise when it has failed."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]


ALONE = Ranks()


def reason(error: Exception) -> str:
    """An error as part of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).rstrip(".")

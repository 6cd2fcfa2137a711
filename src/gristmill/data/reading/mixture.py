"""Which source each sample of a mixture comes from, in closed form: no state, no random draws.

Sample g belongs to one source, and is that source's k-th. Every source's k run 0, 1, 2, … without
gaps, and after any number of samples each has its share of them to within one sample. Sources are
peeled off one after another: of the first x samples, `x * (R - w) // R` are left for the others,
where w is the source's weight and R the sum of those not yet peeled off. All arithmetic is on
integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

MAX_WEIGHT = 2**24
"""Limit of the sum of weights: products with sample numbers stay far below 2^63."""


@dataclass(frozen=True)
class Stage:
    """Weights that hold from a sample on, one for each source; 0 leaves a source out."""

    start: int
    weights: tuple[int, ...]


class Mixture:
    """The sources of samples, by their numbers; stages follow one another from sample 0 on."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        starts = [stage.start for stage in stages]
        assert starts[0] == 0
        assert all(a < b for a, b in itertools.pairwise(starts))
        for stage in stages:
            assert 0 < sum(stage.weights) <= MAX_WEIGHT
            assert min(stage.weights) >= 0
        self.stages = tuple(stages)
        self._starts = np.array(starts, dtype=np.int64)
        # How many samples of each source the stages before take.
        self._bases = [np.zeros(len(stages[0].weights), dtype=np.int64)]
        for stage, following in itertools.pairwise(stages):
            taken = _counts(following.start - stage.start, stage.weights)
            self._bases.append(self._bases[-1] + taken)

    def locate(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """For each global sample number its source, and which of that source's samples it is."""
        source, number = np.empty_like(samples), np.empty_like(samples)
        which = np.searchsorted(self._starts, samples, side="right") - 1
        for index in np.unique(which).tolist():
            here = which == index
            stage = self.stages[index]
            found, inside = _peeled(samples[here] - stage.start, stage.weights)
            source[here], number[here] = found, inside + self._bases[index][found]
        return source, number

    def counts(self, samples: int) -> Int64s:
        """How many of the first `samples` come from each source, int64[sources]."""
        index = int(np.searchsorted(self._starts, samples, side="right")) - 1
        stage = self.stages[index]
        return self._bases[index] + _counts(samples - stage.start, stage.weights)


def _peeled(samples: Int64s, weights: Sequence[int]) -> tuple[Int64s, Int64s]:
    """Source and number within it of samples of one stage."""
    source = np.full(len(samples), -1, dtype=np.int64)
    number = np.empty(len(samples), dtype=np.int64)
    x, rest = samples.copy(), sum(weights)
    for index, weight in enumerate(weights):
        before = x * (rest - weight) // rest if rest else x
        after = (x + 1) * (rest - weight) // rest if rest else x + 1
        mine = (source < 0) & (after == before)
        source[mine], number[mine] = index, (x - before)[mine]
        x, rest = before, rest - weight
    return source, number


def _counts(samples: int, weights: Sequence[int]) -> Int64s:
    """How many of the first samples of a stage come from each source."""
    counts, x, rest = [], samples, sum(weights)
    for weight in weights:
        left = x * (rest - weight) // rest if rest else x
        counts.append(x - left)
        x, rest = left, rest - weight
    return np.array(counts, dtype=np.int64)

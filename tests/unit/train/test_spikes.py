"""What a spike is."""

import math

import pytest

from gristmill.config.sections import TrainArgs
from gristmill.train.spikes import most_loss, remember


def settings(**more):
    return TrainArgs(**{"on_spike": "skip", "spike_window": 4, **more})


def test_nothing_is_a_spike_before_enough_losses_are_known():
    assert most_loss(settings(), [2.0] * 3) == math.inf
    assert most_loss(settings(), [2.0] * 4) < math.inf
    assert most_loss(settings(on_spike="off"), [2.0] * 400) == math.inf
    assert most_loss(TrainArgs(on_spike="stop"), [2.0] * 99) == math.inf
    assert most_loss(TrainArgs(on_spike="stop"), [2.0] * 100) == pytest.approx(2.12)


def test_the_limit_is_so_many_deviations_above_the_mean_of_the_window():
    losses = [9.0, 1.0, 3.0, 1.0, 3.0]
    assert most_loss(settings(spike_deviations=2.0), losses) == pytest.approx(4.0)
    assert most_loss(settings(), losses) == pytest.approx(8.0)


def test_losses_are_kept_as_long_as_the_window():
    kept = []
    for loss in range(7):
        kept = remember(settings(), kept, float(loss))
    assert kept == [3.0, 4.0, 5.0, 6.0]
    assert remember(settings(on_spike="off"), kept, 7.0) == []

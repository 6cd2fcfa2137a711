"""Shares of a mixture are exact, its sources' samples are counted without gaps, stages join."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.reading.mixture import Mixture, Stage

weights = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(lambda w: sum(w) > 0)


@given(weights, st.integers(1, 3000))
def test_numbers_of_each_source_run_without_gaps(weights, length):
    source, number = Mixture([Stage(0, tuple(weights))]).locate(np.arange(length))
    for index in range(len(weights)):
        assert number[source == index].tolist() == list(range((source == index).sum()))


@given(weights, st.integers(0, 10**11))
def test_shares_are_exact_to_one_sample_a_source(weights, samples):
    counts = Mixture([Stage(0, tuple(weights))]).counts(samples)
    assert counts.sum() == samples
    for count, weight in zip(counts.tolist(), weights, strict=True):
        # Each source before it in the list adds less than one to the difference.
        assert abs(count * sum(weights) - samples * weight) <= len(weights) * sum(weights)
        assert weight or not count


@given(weights, st.integers(0, 10**10), st.integers(1, 500))
def test_any_stretch_can_be_located_by_itself(weights, start, length):
    mixture = Mixture([Stage(0, tuple(weights))])
    source, number = mixture.locate(np.arange(start, start + length))
    before = mixture.counts(start)
    for index in range(len(weights)):
        mine = number[source == index]
        assert mine.tolist() == list(range(before[index], before[index] + len(mine)))
    assert (mixture.counts(start + length) - before).tolist() == [
        int((source == index).sum()) for index in range(len(weights))
    ]


@given(st.lists(st.tuples(st.integers(1, 400), weights), min_size=1, max_size=4), st.data())
def test_stages_go_on_from_the_counts_at_their_start(parts, data):
    num = max(len(w) for _, w in parts)
    starts = np.cumsum([0] + [length for length, _ in parts[:-1]]).tolist()
    padded = [tuple(w) + (0,) * (num - len(w)) for _, w in parts]
    mixture = Mixture([Stage(s, w) for s, w in zip(starts, padded, strict=True)])
    total = sum(length for length, _ in parts)
    source, number = mixture.locate(np.arange(total))
    for index in range(num):
        assert number[source == index].tolist() == list(range((source == index).sum()))
    for (length, _), start, w in zip(parts, starts, padded, strict=True):
        alone = Mixture([Stage(0, w)])
        assert (
            source[start : start + length].tolist() == alone.locate(np.arange(length))[0].tolist()
        )
    at = data.draw(st.integers(0, total))
    counts = [int((source[:at] == index).sum()) for index in range(num)]
    assert mixture.counts(at).tolist() == counts


def test_tinyllama_shares():
    mixture = Mixture([Stage(0, (693584, 306416))])
    source, _ = mixture.locate(np.arange(10**6))
    assert (source == 0).sum() == 693584
    window = np.convolve(source == 0, np.ones(1000), mode="valid")
    assert window.min() >= 692
    assert window.max() <= 695

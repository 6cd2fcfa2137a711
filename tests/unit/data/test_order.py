from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.reading import order

EDGES = sorted({2**k + d for k in range(13) for d in (-1, 0, 1)})


@pytest.mark.parametrize("length", EDGES)
def test_perm_is_a_bijection_at_powers_of_two(length):
    assert sorted(order.perm(order.key(7, length), length).tolist()) == list(range(length))


@given(st.integers(0, 2**64 - 1), st.integers(0, 3000))
def test_perm_is_a_bijection(key, length):
    assert np.array_equal(np.sort(order.perm(key, length)), np.arange(length))


def test_mix64_is_the_finaliser_of_splitmix64():
    # First outputs of splitmix64 seeded with 1234567, from its reference implementation.
    states = (1234567 + 0x9E3779B97F4A7C15 * np.arange(1, 4, dtype=object)) % 2**64
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert order.mix64(states.astype(np.uint64)).tolist() == expected


def test_the_order_never_changes():
    """A changed value here means that interrupted runs of older versions cannot be continued."""
    assert order.key(42, 1, 0, 3) == 13216606578839796341
    assert order.perm(order.key(42, 1), 10).tolist() == [4, 5, 2, 8, 6, 0, 3, 7, 9, 1]


def test_keys_tell_parts_apart():
    keys = {order.key(*parts) for parts in [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (-1,)]}
    assert len(keys) == 7


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=200).filter(any),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_every_sample_of_an_epoch_is_met_once(samples, seed, shuffle):
    counts = np.array(samples, dtype=np.int64)
    stream = order.Order(counts, seed, shuffle=shuffle)
    expected = sorted((c, r) for c, n in enumerate(samples) for r in range(n))
    total = stream.num_samples
    for epoch in range(2):
        positions = np.arange(epoch * total, (epoch + 1) * total)
        chunk, row, _ = stream.locate(positions)
        assert sorted(zip(chunk.tolist(), row.tolist(), strict=True)) == expected


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=150).filter(any), st.data())
def test_locating_is_pure(samples, data):
    counts = np.array(samples, dtype=np.int64)
    one = order.Order(counts, 5)
    positions = np.arange(3 * one.num_samples)
    whole = np.stack(one.locate(positions))
    picked = data.draw(st.lists(st.sampled_from(positions.tolist()), min_size=1, max_size=20))
    other = order.Order(counts, 5)
    assert np.array_equal(np.stack(other.locate(np.array(picked))), whole[:, picked])


def test_epochs_seeds_and_sources_differ():
    counts = np.full(70, 5, dtype=np.int64)

    def first(seed: int, source: int, epoch: int) -> list[int]:
        stream = order.Order(counts, seed, source=source)
        chunk, row, _ = stream.locate(np.arange(350) + 350 * epoch)
        return (chunk * 5 + row).tolist()

    streams = [first(1, 0, 0), first(2, 0, 0), first(1, 1, 0), first(1, 0, 1)]
    assert all(a != b for i, a in enumerate(streams) for b in streams[:i])


def test_a_window_mixes_its_chunks_and_no_others():
    counts = np.full(3 * order.WINDOW_CHUNKS, 20, dtype=np.int64)
    stream = order.Order(counts, 1)
    size = order.WINDOW_CHUNKS * 20
    windows = [
        set(stream.locate(np.arange(w * size, (w + 1) * size))[0].tolist()) for w in (0, 1, 2)
    ]
    assert [len(w) for w in windows] == [order.WINDOW_CHUNKS] * 3
    assert not windows[0] & windows[1]
    first_batch = stream.locate(np.arange(256))[0]
    assert len(np.unique(first_batch)) > 55


def test_places_go_up_with_epochs():
    stream = order.Order(np.array([3, 0, 4], dtype=np.int64), 1)
    _, _, place = stream.locate(np.arange(14))
    assert place[:7].max() < 3 <= place[7:].min()


def test_samples_per_chunk_loses_no_target():
    tokens = np.array([0, 1, 8, 9, 16, 17, 18], dtype=np.int64)
    assert order.samples_per_chunk(tokens, 8).tolist() == [0, 0, 0, 1, 1, 2, 2]

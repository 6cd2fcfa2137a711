"""Texts become rows in which every common beginning is there once."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.measure.rows import ROW_TOKENS, batches, plan


def texts_of(lists):
    return [np.asarray(ids, np.int64) for ids in lists]


def planned(lists, num_free=None, batch_tokens=10_000, share=True):
    texts = texts_of(lists)
    free = num_free or [len(ids) for ids in lists]
    return plan(texts, free, batch_tokens=batch_tokens, share=share)


def readings(groups):
    """Every text as its row spells it: number -> ids, and how many tokens there are in all."""
    found, total = {}, 0
    for group in groups:
        total += len(group.beginning)
        for row in group.rows:
            total += len(row)
            for number, path in row.texts:
                assert number not in found
                found[number] = [*group.beginning, *row.tokens[path]]
                assert list(row.depths[path]) == list(range(len(path)))
                check_looks(row, path)
    return found, total


def check_looks(row, path):
    """The last token of a text looks at all of the text and at nothing else."""
    if len(path):
        last = path[-1]
        index = np.arange(len(row))
        seen = np.flatnonzero((index <= last) & (last < row.ends))
        assert list(seen) == list(path)


def num_in_trie(lists):
    return len({tuple(ids[:n]) for ids in lists for n in range(1, len(ids) + 1)})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=40))
def test_every_text_is_there_once_and_whole(lists):
    lists = [list(ids) for ids in dict.fromkeys(map(tuple, lists))]
    found, total = readings(planned(lists))
    assert found == dict(enumerate(lists))
    rows = sum(len(group.rows) for group in planned(lists))
    if rows == 1:
        assert total == num_in_trie(lists)


def test_choices_cost_their_context_once():
    context = list(range(100, 300))
    lists = [[*context, 7, n] for n in range(4)]
    found, total = readings(planned(lists))
    assert found == dict(enumerate(lists))
    assert total == len(context) + 1 + 4


def test_without_sharing_every_text_is_its_own():
    lists = [[1, 2, 3], [1, 2, 4], [1, 2]]
    found, total = readings(planned(lists, share=False))
    assert found == dict(enumerate(lists))
    assert total == 8


def test_a_long_beginning_of_many_texts_is_read_once():
    rng = random.Random(0)
    examples = [rng.randrange(500) for _ in range(700)]
    questions = [[*examples, *(rng.randrange(500) for _ in range(30))] for _ in range(40)]
    others = [[rng.randrange(500) for _ in range(20)] for _ in range(5)]
    lists = [ids + [n] for ids in questions for n in range(4)] + others
    groups = planned(lists, batch_tokens=600)
    assert [len(group.beginning) for group in groups] == [700, 0]
    found, total = readings(groups)
    assert found == dict(enumerate(lists))
    assert total <= 700 + 40 * 34 + 5 * 20


def test_a_beginning_ends_before_what_is_asked_for():
    lists = [[*range(200), *range(n, n + 30)] for n in range(40)]
    num_free = [90] * len(lists)
    groups = planned(lists, num_free, batch_tokens=300)
    assert len(groups[0].beginning) == 90
    assert readings(groups)[0] == dict(enumerate(lists))


def test_rows_are_no_longer_than_they_need_to_be():
    rng = random.Random(1)
    lists = [[rng.randrange(9) for _ in range(rng.randrange(5, 15))] for _ in range(500)]
    lists = [list(ids) for ids in dict.fromkeys(map(tuple, lists))]
    (group,) = planned(lists)
    assert max(map(len, group.rows)) <= ROW_TOKENS
    assert np.mean([len(row) for row in group.rows[:-1]]) > 0.85 * ROW_TOKENS
    assert list(map(len, group.rows)) == sorted(map(len, group.rows), reverse=True)


@pytest.mark.parametrize("batch_tokens", [1, 300, 5000])
def test_batches_keep_to_their_size(batch_tokens):
    lists = [[n] * (n % 60 + 1) for n in range(300)]
    (group,) = planned(lists)
    cut = list(batches(group.rows, batch_tokens))
    assert [row for batch in cut for row in batch] == group.rows
    for batch in cut:
        assert len(batch) == 1 or len(batch) * len(batch[0]) <= batch_tokens

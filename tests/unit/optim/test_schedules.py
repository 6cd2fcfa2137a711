from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.optim.schedules import lr_at

SCHEDULES = ["cosine", "wsd", "linear", "constant"]


def curve(schedule, warmup=10, total=100, peak=1.0, min_lr=0.1, fraction=0.2):
    return [
        lr_at(
            step,
            peak=peak,
            min_lr=min_lr,
            warmup_steps=warmup,
            total_steps=total,
            schedule=schedule,
            decay_fraction=fraction,
        )
        for step in range(total)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_in_equal_parts_from_the_first_step(schedule):
    assert curve(schedule)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_cosine_closed_form():
    for step, lr in enumerate(curve("cosine")[10:], start=10):
        angle = math.pi * (step - 9) / 90
        assert lr == pytest.approx(0.1 + 0.9 * (1 + math.cos(angle)) / 2)


def test_linear_closed_form():
    for step, lr in enumerate(curve("linear")[10:], start=10):
        assert lr == pytest.approx(1 - 0.9 * (step - 9) / 90)


def test_wsd_is_flat_then_falls_over_its_fraction():
    lrs = curve("wsd")
    assert lrs[9:80] == [1.0] * 71
    assert lrs[80:] == pytest.approx([1 - 0.9 * k / 20 for k in range(1, 21)])


def test_constant():
    assert curve("constant")[9:] == [1.0] * 91


def test_steps_past_the_end_keep_the_last_value():
    for schedule, last in [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)]:
        lr = lr_at(500, peak=1.0, min_lr=0.1, warmup_steps=0, total_steps=100, schedule=schedule)
        assert lr == last


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    peak=st.floats(1e-6, 1.0),
    ratio=st.floats(0.0, 1.0),
    fraction=st.floats(0.0, 1.0),
)
def test_shape(schedule, total, warmup, peak, ratio, fraction):
    min_lr = peak * ratio
    lrs = curve(schedule, warmup, total, peak, min_lr, fraction)
    assert all(0 <= lr <= peak for lr in lrs)
    assert lrs[0] > 0 or (total == 1 and min_lr == 0) or warmup == 0
    top = min(warmup, total)
    assert lrs[:top] == sorted(lrs[:top])
    if warmup:
        tail = lrs[warmup - 1 :]
        assert not tail or tail[0] == peak
        assert tail == sorted(tail, reverse=True)
    if warmup < total and schedule != "constant" and total > 1:
        assert lrs[-1] == min_lr

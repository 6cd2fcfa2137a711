"""Batches, steps and intervals fit the run; values that cannot work are refused with a fix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.config.sections import EvalArgs, TrainArgs
from gristmill.train.length import plan_length, seconds
from gristmill.util.errors import UserError


def plan(num_samples=10_000, seq_len=512, earlier=None, **train):
    return plan_length(
        TrainArgs(**train), EvalArgs(), seq_len=seq_len, num_samples=num_samples, earlier=earlier
    )


@given(
    num_samples=st.integers(1, 10**9),
    seq_len=st.sampled_from([1, 7, 128, 512, 2048, 8192]),
)
def test_auto_always_makes_a_run_of_one_epoch(num_samples, seq_len):
    length = plan(num_samples, seq_len)
    assert length.total_steps >= 1
    assert length.global_batch_size <= num_samples
    used = length.total_steps * length.global_batch_size
    assert num_samples - length.global_batch_size < used <= num_samples
    assert length.warmup_steps <= max(1, length.total_steps)
    assert 1 <= length.save_interval <= 1000


@given(max_tokens=st.integers(512, 10**12))
def test_auto_batch_fits_any_typed_token_limit(max_tokens):
    length = plan(max_tokens=max_tokens)
    assert 0 < length.total_steps * length.step_tokens <= max_tokens


def test_typed_batch_above_the_tokens_is_refused_with_one_that_fits():
    with pytest.raises(UserError, match=r"max_tokens=1,000,000 is below one global batch") as error:
        plan(seq_len=2048, max_tokens=1_000_000, global_batch_size=512)
    assert error.value.fix == {"--train.global_batch_size": 488}
    assert plan(seq_len=2048, max_tokens=1_000_000, global_batch_size=488).total_steps == 1


def test_fewer_tokens_than_one_sample_are_refused():
    with pytest.raises(UserError, match="below one global batch") as error:
        plan(max_tokens=100)
    assert plan(max_tokens=error.value.fix["--train.max_tokens"]).total_steps == 1


def test_warmup_longer_than_the_run_is_refused_with_one_that_fits():
    with pytest.raises(UserError, match=r"lr_warmup_steps=2000 .* \(100 steps\)") as error:
        plan(max_steps=100, lr_warmup_steps=2000)
    assert plan(max_steps=100, lr_warmup_steps=error.value.fix["--train.lr_warmup_steps"])


def test_warmup_as_a_fraction_of_the_run():
    assert plan(max_steps=200, lr_warmup_fraction=0.1).warmup_steps == 20
    with pytest.raises(UserError, match=r"not in \[0, 1\)"):
        plan(max_steps=200, lr_warmup_fraction=1.5)
    with pytest.raises(UserError, match="Give one of them"):
        plan(max_steps=200, lr_warmup_fraction=0.1, lr_warmup_steps=5)


def test_the_shortest_limit_wins():
    assert plan(max_steps=5, max_tokens=10**9).total_steps == 5
    assert plan(max_steps=10**6, max_tokens=512 * 80, global_batch_size=8).total_steps == 10
    assert plan(num_samples=80, global_batch_size=8, epochs=2.5).total_steps == 25
    assert plan(num_samples=80, global_batch_size=8, epochs=3, max_tokens=4096).total_steps == 1


def test_fewer_tokens_than_a_batch_are_refused_with_a_step_limit_too():
    with pytest.raises(UserError, match="below one global batch"):
        plan(max_tokens=10, max_steps=3)


def test_a_time_limit_of_nothing_is_refused():
    with pytest.raises(UserError, match="max_time 0s trains nothing"):
        plan(max_time="0s")


def test_steps_alone_may_pass_the_epoch():
    assert plan(num_samples=16, global_batch_size=8, max_steps=100).total_steps == 100


def test_a_data_set_smaller_than_the_batch_makes_one_step():
    assert plan(num_samples=3, global_batch_size=8).total_steps == 1


def test_an_auto_batch_is_whole_micro_batches():
    assert plan(micro_batch_size=3).global_batch_size % 3 == 0


def test_a_micro_batch_above_the_batch_is_refused():
    with pytest.raises(UserError, match="micro_batch_size=16 is above global_batch_size=8"):
        plan(micro_batch_size=16, global_batch_size=8)


def test_a_continued_run_keeps_what_auto_became():
    first = plan(max_tokens=512 * 1000)
    longer = plan(max_tokens=512 * 1000 * 1000, earlier=first)
    assert longer.global_batch_size == first.global_batch_size
    assert longer.warmup_steps == first.warmup_steps
    assert longer.total_steps > first.total_steps


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1h30m", 5400)]
)
def test_durations(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["soon", "5 years", "", "-3s", "3x"])
def test_bad_durations(text):
    with pytest.raises(UserError, match="is not a duration"):
        seconds(text)


@pytest.mark.parametrize("name", ["save_interval", "global_batch_size", "max_steps"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(UserError, match=f"--train.{name} 0 is not a positive"):
        plan(**{name: 0})

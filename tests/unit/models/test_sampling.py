import pytest
import torch

from gristmill.models.sampling import sample

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]]).log_softmax(-1)


def draws(number: int = 4000, **options) -> torch.Tensor:
    """How often each id is drawn, [5]."""
    generator = torch.Generator().manual_seed(0)
    ids = sample(LOGITS.expand(number, -1), generator=generator, **options)
    assert ids.shape == (number,)
    assert ids.dtype is torch.int64
    return torch.bincount(ids, minlength=5) / number


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.1}]
)
def test_sharpest_settings_take_the_largest_logit(options):
    rows = torch.randn(50, 9)
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | options
    assert torch.equal(sample(rows, **options), rows.argmax(-1)) or options["top_p"] == 0.1
    assert draws(**options)[1] == 1.0


def test_plain_sampling_follows_the_probabilities():
    torch.testing.assert_close(draws(), LOGITS[0].exp(), atol=0.02, rtol=0)


def test_temperature_flattens():
    expected = (LOGITS[0] / 2).softmax(-1)
    torch.testing.assert_close(draws(temperature=2.0), expected, atol=0.02, rtol=0)


def test_top_k_keeps_the_k_largest_in_proportion():
    kept = draws(top_k=2)
    probs = LOGITS[0].exp() * torch.tensor([0, 1, 0, 1, 0])
    torch.testing.assert_close(kept, probs / probs.sum(), atol=0.02, rtol=0)
    torch.testing.assert_close(draws(top_k=99), draws())


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # Probabilities 0.64, 0.24, 0.09, 0.03, 0.01: 0.8 needs two, 0.9 three.
    assert draws(top_p=0.8).nonzero().flatten().tolist() == [1, 3]
    assert draws(top_p=0.9).nonzero().flatten().tolist() == [1, 2, 3]
    assert draws(top_p=0.9, top_k=2).nonzero().flatten().tolist() == [1, 3]


def test_rows_are_apart():
    rows = torch.full((3, 4), -20.0)
    rows[0, 1] = rows[1, 3] = rows[2, 0] = 20.0
    assert sample(rows, top_k=3, top_p=0.9).tolist() == [1, 3, 0]


def test_generator_decides():
    assert torch.equal(draws(), draws())


def test_bf16_logits_are_sampled_in_fp32():
    rows = torch.zeros(20000, 1000, dtype=torch.bfloat16)
    ids = sample(rows, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == pytest.approx(500, abs=2)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-40, "min_p": 0.5},
        {"temperature": 1e-5},
        {"top_p": 1e-300},
        {"top_p": 1e-45, "top_k": 3},
        {"temperature": 1e-4, "top_p": 1e-40, "min_p": 1.0},
    ],
)
def test_tiny_options_take_the_likeliest(options):
    rows = 1e35 * torch.randn(50, 9)
    assert torch.equal(sample(rows, **options), rows.argmax(-1))
    assert draws(**options)[1] == 1.0

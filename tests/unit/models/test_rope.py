import math

import pytest
import torch

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models.rope import apply_rope, frequencies, rope_tables

CONFIG = ModelConfig(hidden_size=64, num_heads=4)


def test_rotation_is_the_complex_one():
    x = torch.randn(2, 9, 4, 16)
    cos, sin = rope_tables(CONFIG, torch.arange(9))
    turned = apply_rope(x, cos, sin)
    as_complex = torch.complex(x[..., :8].double(), x[..., 8:].double())
    for position in range(9):
        angles = [position * 10000 ** (-2 * i / 16) for i in range(8)]
        turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
        expected = as_complex[:, position] * turn
        torch.testing.assert_close(turned[:, position, :, :8], expected.real.float())
        torch.testing.assert_close(turned[:, position, :, 8:], expected.imag.float())


def test_only_the_leading_share_is_rotated():
    config = ModelConfig(hidden_size=64, num_heads=4, rope_fraction=0.25)
    x = torch.randn(1, 5, 4, 16)
    turned = apply_rope(x, *rope_tables(config, torch.arange(5)))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert (turned[:, 1:, :, :4] - x[:, 1:, :, :4]).abs().max() > 0.1


def test_tables_stay_exact_under_autocast_at_long_positions():
    positions = torch.tensor([100_003])
    with torch.autocast("cpu", torch.bfloat16):
        cos, _ = rope_tables(CONFIG, positions)
    assert cos.dtype is torch.float32
    exact = torch.tensor([math.cos(100_003 * 10000 ** (-2 * i / 16)) for i in range(8)])
    torch.testing.assert_close(cos.flatten(), exact, atol=2e-2, rtol=0)


def test_scaling_stretches_long_waves_only():
    scaling = RopeScaling(factor=8.0)
    scaled = ModelConfig(hidden_size=512, num_heads=4, rope_theta=5e5, rope_scaling=scaling)
    plain = ModelConfig(hidden_size=512, num_heads=4, rope_theta=5e5)
    ratio = frequencies(scaled) / frequencies(plain)
    waves = 2 * math.pi / frequencies(plain)
    assert torch.equal(ratio[waves < 8192 / 4], torch.ones_like(ratio[waves < 8192 / 4]))
    torch.testing.assert_close(ratio[waves > 8192], torch.full_like(ratio[waves > 8192], 1 / 8))
    between = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert len(between) > 1
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (between.diff() < 0).all()


def test_odd_rotated_part_is_our_mistake():
    with pytest.raises(AssertionError, match="even"):
        frequencies(ModelConfig(hidden_size=36, num_heads=4))

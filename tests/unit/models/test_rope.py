import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gristmill.config.model import LatentAttention, ModelConfig, RopeScaling
from gristmill.models.rope import apply_rope, frequencies, rope_tables, rotary_dim

CONFIG = ModelConfig(hidden_size=64, num_heads=4)


def test_rotation_is_the_complex_one():
    x = torch.randn(2, 9, 4, 16)
    cos, sin = rope_tables(CONFIG, torch.arange(9), 9)
    turned = apply_rope(x, cos, sin)
    as_complex = torch.complex(x[..., :8].double(), x[..., 8:].double())
    for position in range(9):
        angles = [position * 10000 ** (-2 * i / 16) for i in range(8)]
        turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
        expected = as_complex[:, position] * turn
        torch.testing.assert_close(turned[:, position, :, :8], expected.real.float())
        torch.testing.assert_close(turned[:, position, :, 8:], expected.imag.float())


def test_only_the_leading_share_is_rotated():
    config = replace(CONFIG, rope_fraction=0.25)
    x = torch.randn(1, 5, 4, 16)
    turned = apply_rope(x, *rope_tables(config, torch.arange(5), 5))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert (turned[:, 1:, :, :4] - x[:, 1:, :, :4]).abs().max() > 0.1


def test_latent_attention_rotates_a_part_of_its_own():
    latent = LatentAttention(kv_lora_rank=8, qk_nope_head_dim=20, qk_rope_head_dim=6, v_head_dim=16)
    config = replace(CONFIG, latent_attention=latent)
    assert rotary_dim(config) == 6
    assert rope_tables(config, torch.arange(5), 5)[0].shape == (5, 1, 3)


def test_tables_stay_exact_under_autocast_at_long_positions():
    positions = torch.tensor([100_003])
    with torch.autocast("cpu", torch.bfloat16):
        cos, _ = rope_tables(CONFIG, positions, 100_004)
    assert cos.dtype is torch.float32
    exact = torch.tensor([math.cos(100_003 * 10000 ** (-2 * i / 16)) for i in range(8)])
    torch.testing.assert_close(cos.flatten(), exact, atol=2e-2, rtol=0)


def test_scaling_stretches_long_waves_only():
    scaling = RopeScaling(factor=8.0)
    plain = ModelConfig(hidden_size=512, num_heads=4, rope_theta=5e5)
    ratio = frequencies(replace(plain, rope_scaling=scaling)) / frequencies(plain)
    waves = 2 * math.pi / frequencies(plain)
    assert torch.equal(ratio[waves < 8192 / 4], torch.ones_like(ratio[waves < 8192 / 4]))
    torch.testing.assert_close(ratio[waves > 8192], torch.full_like(ratio[waves > 8192], 1 / 8))
    between = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert len(between) > 1
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (between.diff() < 0).all()


def test_blocks_with_a_window_have_their_own_base_and_no_scaling():
    scaling = RopeScaling(kind="yarn", factor=8.0, original_max_seq_length=64)
    config = replace(CONFIG, rope_theta=1e6, rope_local_theta=5e3, rope_scaling=scaling)
    positions = torch.arange(100)
    local = rope_tables(config, positions, 100, local=True)
    expected = rope_tables(replace(CONFIG, rope_theta=5e3), positions, 100)
    assert all(torch.equal(a, b) for a, b in zip(local, expected, strict=True))
    assert not torch.equal(rope_tables(config, positions, 100)[0], expected[0])


LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 10 for i in range(8)],
    "long_factor": [2 + i for i in range(8)],
}
OURS_LONG = {
    "kind": "longrope",
    "short_factors": tuple(LONG["short_factor"]),
    "long_factors": tuple(LONG["long_factor"]),
}
# Words of transformers -> ours, for an original context of 64 tokens.
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"kind": "linear", "factor": 4.0}),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, {"kind": "dynamic", "factor": 4.0}),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"kind": "llama3", "factor": 8.0},
    ),
    "llama3-other-borders": (
        {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
        {"kind": "llama3", "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, {"kind": "yarn", "factor": 4.0}),
    "yarn-borders": (
        {"rope_type": "yarn", "factor": 40.0, "beta_fast": 6.0, "beta_slow": 2.0},
        {"kind": "yarn", "factor": 40.0, "beta_fast": 6.0, "beta_slow": 2.0},
    ),
    "yarn-borders-that-meet": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
        {"kind": "yarn", "factor": 4.0, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    ),
    "yarn-fractions": (
        {"rope_type": "yarn", "factor": 4.0, "truncate": False},
        {"kind": "yarn", "factor": 4.0, "truncate": False},
    ),
    "yarn-mscale": (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        {"kind": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    ),
    "yarn-mscale-alone": (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.5},
        {"kind": "yarn", "factor": 40.0, "mscale": 0.5},
    ),
    "yarn-attention": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
        {"kind": "yarn", "factor": 4.0, "attention_factor": 1.25},
    ),
    "longrope": (LONG | {"factor": 32.0}, OURS_LONG | {"factor": 32.0}),
    "longrope-attention": (
        LONG | {"factor": 32.0, "attention_factor": 1.3},
        OURS_LONG | {"factor": 32.0, "attention_factor": 1.3},
    ),
    "longrope-of-one": (LONG | {"factor": 1.0}, OURS_LONG | {"factor": 1.0}),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [1, 64, 65, 200, 4096])
@pytest.mark.parametrize(("theta", "fraction"), [(10000.0, 1.0), (5e5, 0.5)])
def test_every_scaling_is_that_of_transformers(name, length, theta, fraction):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    words, fields = SCALINGS[name]
    width = int(16 / fraction)  # the rotated part stays 16 wide: longrope has 8 factors
    parameters = {"rope_theta": theta, "partial_rotary_factor": fraction, **words}
    if words["rope_type"] not in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = 64
    theirs = SimpleNamespace(
        rope_parameters=parameters,
        standardize_rope_params=lambda: None,
        head_dim=width,
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS[words["rope_type"]](theirs, seq_len=length)
    scaling = RopeScaling(original_max_seq_length=64, **fields)
    config = replace(
        CONFIG,
        hidden_size=4 * width,
        rope_theta=theta,
        rope_fraction=fraction,
        rope_scaling=scaling,
    )
    torch.testing.assert_close(frequencies(config, length), expected, atol=0, rtol=1e-6)
    assert scaling.table_factor == pytest.approx(factor, rel=1e-12)
    positions = torch.tensor([0, length - 1])
    cos, sin = rope_tables(config, positions, length)
    angles = positions[:, None, None].float() * frequencies(config, length)
    torch.testing.assert_close(cos, angles.cos() * factor)
    torch.testing.assert_close(sin, angles.sin() * factor)


def test_dynamic_scaling_begins_behind_the_original_context():
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_seq_length=64)
    config = replace(CONFIG, rope_scaling=scaling)
    assert torch.equal(frequencies(config, 64), frequencies(CONFIG))
    assert (frequencies(config, 65)[1:] < frequencies(CONFIG)[1:]).all()


def test_odd_rotated_part_is_our_mistake():
    with pytest.raises(AssertionError, match="even"):
        frequencies(ModelConfig(hidden_size=36, num_heads=4))


def test_longrope_without_its_factors_is_our_mistake():
    scaling = RopeScaling(kind="longrope", short_factors=(1.0,) * 7, long_factors=(1.0,) * 8)
    with pytest.raises(AssertionError, match="8 factors"):
        frequencies(replace(CONFIG, rope_scaling=scaling))

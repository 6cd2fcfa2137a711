"""Every layout: which number goes where, and that the way back is exact."""

from __future__ import annotations

import pytest
import torch

from gristmill.config.model import LatentAttention, ModelConfig
from gristmill.formats.layouts import LAYOUTS, to_ours, to_theirs

CONFIG = ModelConfig(hidden_size=6, num_heads=4, num_kv_heads=2, head_dim=2)
LATENT = ModelConfig(
    hidden_size=6,
    num_heads=2,
    latent_attention=LatentAttention(
        kv_lora_rank=3, qk_nope_head_dim=1, qk_rope_head_dim=4, v_head_dim=2
    ),
)
QKV = [(8, 6), (4, 6), (4, 6)]
# layout -> configuration, shapes of the parameters, number of tensors in the file
CASES = {
    "same": (CONFIG, [(3, 6)], 1),
    "transposed": (CONFIG, [(3, 6)], 1),
    "groups": (CONFIG, QKV, 1),
    "blocks": (CONFIG, QKV, 1),
    "blocks_transposed": (CONFIG, QKV, 1),
    "experts": (CONFIG, [(5, 3, 6)], 5),
    "stacked_blocks": (CONFIG, [(5, 3, 6), (5, 2, 6)], 1),
    "halves_swapped": (CONFIG, [(8, 6)], 1),
    "pairs_per_head": (LATENT, [(10, 6)], 1),
    "pairs_at_end": (LATENT, [(7, 6)], 1),
}


def numbered(shapes):
    """Tensors of which no two numbers are equal."""
    start = 0
    for shape in shapes:
        count = torch.Size(shape).numel()
        yield torch.arange(start, start + count).view(shape)
        start += count


def test_every_layout_has_a_case():
    assert CASES.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", CASES)
def test_the_way_back_is_exact(layout):
    config, shapes, count = CASES[layout]
    ours = list(numbered(shapes))
    theirs = to_theirs(layout, ours, config)
    assert len(theirs) == count
    back = to_ours(layout, theirs, config, shapes)
    assert all(torch.equal(a, b) for a, b in zip(back, ours, strict=True))
    if layout != "same":
        assert not (len(theirs) == 1 and torch.equal(theirs[0], ours[0]))


def test_groups_go_head_by_head():
    """Two key heads of two rows, two query heads each."""
    (fused,) = to_theirs("groups", list(numbered([(8,), (4,), (4,)])), CONFIG)
    assert fused.tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]


def test_blocks_follow_each_other():
    (fused,) = to_theirs("blocks", list(numbered([(8,), (4,), (4,)])), CONFIG)
    assert fused.tolist() == list(range(16))


def test_pairs_become_halves_behind_what_is_not_rotated():
    rows = torch.arange(10)
    (ours,) = to_ours("pairs_per_head", [rows], LATENT, [(10,)])
    assert ours.tolist() == [0, 1, 3, 2, 4, 5, 6, 8, 7, 9]
    (ours,) = to_ours("pairs_at_end", [torch.arange(7)], LATENT, [(7,)])
    assert ours.tolist() == [0, 1, 2, 3, 5, 4, 6]


def test_swapped_halves_turn_the_other_way():
    (ours,) = to_ours("halves_swapped", [torch.arange(4)], CONFIG, [(4,)])
    assert ours.tolist() == [1, 0, 3, 2]

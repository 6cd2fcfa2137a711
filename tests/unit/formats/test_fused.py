import pytest
import torch

from gristmill.config.model import ModelConfig
from gristmill.formats import fused

PLAIN = ModelConfig(hidden_size=6, num_heads=3)
GROUPED = ModelConfig(hidden_size=12, num_heads=6, num_kv_heads=2)


def test_rows_of_a_head_lie_together():
    matrix = torch.arange(18.0)
    q, k, v = fused.split(matrix, PLAIN)
    assert q.tolist() == [0, 1, 6, 7, 12, 13]
    assert k.tolist() == [2, 3, 8, 9, 14, 15]
    assert v.tolist() == [4, 5, 10, 11, 16, 17]


def test_groups_hold_their_query_heads_before_key_and_value():
    q, k, v = fused.split(torch.arange(20.0), GROUPED)
    assert q.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert k.tolist() == [6, 7, 16, 17]
    assert v.tolist() == [8, 9, 18, 19]


@pytest.mark.parametrize("config", [PLAIN, GROUPED])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_joining_inverts_splitting(config, rest):
    matrix = torch.randn(fused.rows(config), *rest)
    parts = fused.split(matrix, config)
    assert [len(part) for part in parts] == [
        config.num_heads * config.head_size,
        config.kv_heads * config.head_size,
        config.kv_heads * config.head_size,
    ]
    assert torch.equal(fused.join(parts, config), matrix)

"""Where most positions do not count, their logits are not made; loss and gradients stay."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gristmill.models import loss
from gristmill.models.loss import CPU_CHUNK_ROWS, IGNORE, linear_cross_entropy

ROWS, WIDTH, TOKENS = 4 * CPU_CHUNK_ROWS, 8, 30


def case(share):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(0, TOKENS, (ROWS,))
    return hidden, weight, targets.masked_fill(torch.rand(ROWS) >= share, IGNORE)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.4, 0.9, 1.0])
def test_loss_and_gradients_are_those_of_the_counted_positions(share):
    hidden, weight, targets = case(share)
    got = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(got, (hidden, weight))
    wanted = functional.cross_entropy(
        hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum"
    )
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert (mine - theirs).abs().max() < 1e-4
    masked = targets == IGNORE
    assert not gradients[0][masked].any()  # exactly nothing


def test_only_chunks_with_counted_positions_are_computed(monkeypatch):
    seen = []
    inner = loss._LinearCrossEntropy.apply
    monkeypatch.setattr(
        loss._LinearCrossEntropy, "apply", lambda h, *rest: seen.append(len(h)) or inner(h, *rest)
    )
    for share in (0.0, 0.1, 0.4, 0.9):
        hidden, weight, targets = case(share)
        linear_cross_entropy(hidden, weight, targets)
    assert seen == [CPU_CHUNK_ROWS, CPU_CHUNK_ROWS, 2 * CPU_CHUNK_ROWS, ROWS]

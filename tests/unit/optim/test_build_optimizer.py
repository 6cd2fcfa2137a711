from __future__ import annotations

import pytest
import torch
from torch import nn

from gristmill.config import sections
from gristmill.optim.build import build_optimizer, parameter_groups
from gristmill.util.errors import UserError


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def names_by_decay(model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, lr=0.1, weight_decay=0.3)
    }


def test_groups():
    no_decay = {"embed.weight", "norm.weight", "norm.bias", "up.bias"}
    assert names_by_decay(Model(tied=False)) == {0.3: {"up.weight", "head.weight"}, 0.0: no_decay}
    assert names_by_decay(Model(tied=True)) == {0.3: {"up.weight"}, 0.0: no_decay}


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = Model(tied=True)
    model.up.weight.requires_grad_(False)
    assert names_by_decay(model) == {0.0: {"embed.weight", "norm.weight", "norm.bias", "up.bias"}}


def test_settings_reach_the_optimizer():
    cfg = sections.AdamW(lr=2e-3, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(Model(tied=False), cfg, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert group["peak_lr"] == group["lr"] == 2e-3
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-6
        assert group["weight_decay"] == decay
        assert group["fused"]


def test_first_step_is_decay_and_sign():
    """AdamW's first update is lr * sign(gradient), after weights shrink by lr * decay."""
    model = Model(tied=False)
    cfg = sections.AdamW(lr=0.01, weight_decay=0.5, eps=0.0)
    optimizer = build_optimizer(model, cfg, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.5 if name in ("up.weight", "head.weight") else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad.sign()
        torch.testing.assert_close(p.detach(), expected)


def test_unknown_optimizer():
    class Lion(sections.Optimizer):
        pass

    with pytest.raises(UserError, match="Lion is not known. Known: AdamW"):
        build_optimizer(Model(tied=False), Lion(), torch.device("cpu"))

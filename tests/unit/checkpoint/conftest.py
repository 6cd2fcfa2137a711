from __future__ import annotations

import pytest
import torch
from torch import nn

from gristmill.config.model import ModelConfig


class Tiny(nn.Module):
    """Every kind of tensor a decoder has: embedding, norm, matrix, bias, and a shared weight."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(float(seed)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.norm(self.embed(ids))) * self.scale)


def build(seed: int, width: int = 8, fused: bool = True):
    model = Tiny(seed, width)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def train(model, optimizer, steps) -> None:
    """Steps whose input is a function of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 16, (4, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def same_state(a, b) -> bool:
    """Whether two (model, optimizer) pairs are equal bit for bit."""
    (model_a, opt_a), (model_b, opt_b) = a, b
    pairs = list(zip(model_a.parameters(), model_b.parameters(), strict=True))
    for p, q in pairs:
        if not torch.equal(p, q) or opt_a.state[p].keys() != opt_b.state[q].keys():
            return False
        for key, value in opt_a.state[p].items():
            other = opt_b.state[q][key]
            if value.dtype != other.dtype or not torch.equal(value, other):
                return False
    return bool(torch.equal(model_a.scale, model_b.scale))


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(name="tiny", hidden_size=8)


@pytest.fixture
def trained():
    pair = build(seed=1)
    train(*pair, range(3))
    return pair

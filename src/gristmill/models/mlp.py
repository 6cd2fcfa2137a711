"""Feed-forward layers: each token on its own, wide and back."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.models.kernels import gated


def relu2(x: Tensor) -> Tensor:
    """The square of relu (arXiv:2109.08668)."""
    return F.relu(x).square()


def build_activation(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The activation that a model uses; gelu is exact, gelu_tanh its approximation by tanh."""
    tanh = functools.partial(F.gelu, approximate="tanh")
    return {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": tanh, "relu2": relu2}[config.activation]


def build_mlp(config: ModelConfig, inner: int | None = None) -> nn.Module:
    """The feed-forward layer that a model uses, `inner` wide (unset: intermediate_size)."""
    kind = {"gated": Gated, "plain": Plain}[config.mlp]
    return kind(config, inner or config.intermediate_size)


class Gated(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.mlp_bias
        self.activation = build_activation(config)
        self.gate = nn.Linear(d, inner, bias=bias)
        self.up = nn.Linear(d, inner, bias=bias)
        self.down = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each token of x [..., d] on its own, [..., d]."""
        if self.activation is F.silu:
            return self.down(gated(x, self.gate, self.up))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """Plain feed-forward: down(act(up(x)))."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.mlp_bias
        self.activation = build_activation(config)
        self.up = nn.Linear(d, inner, bias=bias)
        self.down = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each token of x [..., d] on its own, [..., d]."""
        return self.down(self.activation(self.up(x)))

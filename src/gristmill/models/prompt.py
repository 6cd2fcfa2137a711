"""Trained vectors that attention looks at besides the text (LLaMA-Adapter, arXiv:2303.16199)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gristmill.config.model import ModelConfig

if TYPE_CHECKING:
    from gristmill.models.attention import Attention


class Prompt(nn.Module):
    """Vectors whose keys and values a block's own matrices make; they have no position.

    Queries look at them apart from the text, and what they gather is multiplied with a gate that
    begins at 0: until it is trained the model is what it was. Parameters: vectors [n, d], gate [1].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.adaption_prompt is not None, "the configuration has no adaption prompt"
        self.projected = config.adaption_prompt.projected
        self.vectors = nn.Parameter(torch.empty(config.adaption_prompt.length, config.hidden_size))
        self.gate = nn.Parameter(torch.empty(1))

    def forward(self, attention: Attention, q: Tensor, gathered: Tensor) -> Tensor:
        """The output of `attention` [B, T, d], of its queries and what it gathered from the text.

        q: [B, heads, T, D], normalised and rotated; gathered: [B, T, heads * D].
        """
        k, v = attention.keys_and_values(self.vectors.to(q.dtype).unsqueeze(0))
        grouped = q.unflatten(1, (k.shape[1], -1))
        scores = (grouped @ k.unsqueeze(2).transpose(-1, -2).to(q.dtype)).float()
        scores = scores * (attention.scale or q.shape[-1] ** -0.5)
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        weights = (self.gate * scores.softmax(-1)).to(q.dtype)
        more = (weights @ v.unsqueeze(2).to(q.dtype)).flatten(1, 2).transpose(1, 2).flatten(2)
        if self.projected:
            return attention.o(gathered + more)
        return attention.o(gathered) + more

"""Normalisation of vectors: RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig


def build_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """The normalisation that a model uses, over the last `size` values (unset: hidden_size)."""
    size = size or config.hidden_size
    if config.norm == "layernorm":
        return nn.LayerNorm(
            size, config.norm_eps, elementwise_affine=config.norm_weight, bias=config.norm_bias
        )
    if config.norm_unit_offset:
        return OffsetRMSNorm(size, config.norm_eps)
    return nn.RMSNorm(size, config.norm_eps, elementwise_affine=config.norm_weight)


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm that multiplies with 1 + weight, so that weight decay pulls towards one.

    The sum is taken in fp32: in bf16 it would round small weights away.
    """

    def reset_parameters(self) -> None:
        """The neutral weight: 0."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [..., size], same shape and dtype."""
        out = F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps)
        return out.to(x.dtype)

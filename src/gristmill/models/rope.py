"""Rotary position embedding: angles in fp32, computed once per forward and shared by all layers.

Nothing is stored in the model, so a decoder built on the meta device needs no buffers filled, and
every position up to any length exists without a table having been sized for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig, RopeScaling


def rotary_dim(config: ModelConfig) -> int:
    """Leading values of each head that are rotated (an even number)."""
    dim = int(config.head_size * config.rope_fraction)
    assert dim % 2 == 0, f"rotated part of a head must be even, is {dim}"
    return dim


def frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Angle per position, float32 [rotary_dim / 2]: theta^(-2i / rotary_dim) (arXiv:2104.09864)."""
    dim = rotary_dim(config)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    inverse = 1.0 / (config.rope_theta**exponent)
    return inverse if config.rope_scaling is None else _stretched(inverse, config.rope_scaling)


def _stretched(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies for a longer context (arXiv:2407.21783, section 3.2).

    Wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than
    original / high_freq_factor stay, and between the two the mix runs linearly in 1 / wavelength.
    """
    turns = scaling.original_max_seq_length * inverse / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return inverse * (keep + (1 - keep) / scaling.factor)


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: float32 [..., T, 1, rotary_dim / 2] for positions [..., T].

    The axis of length one is where the heads go.
    """
    # Products of two numbers each, which autocast leaves alone: bf16 angles would be wrong by whole
    # turns at long positions.
    angles = positions.float().unsqueeze(-1) * frequencies(config, positions.device)
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads x [B, T, heads, head_size] rotated, same shape and dtype.

    The two halves of the rotated part form the pairs, as in the Hugging Face models of both
    families; values behind the rotated part pass through. Products are taken in fp32.
    """
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(turned, dim=-1).to(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)

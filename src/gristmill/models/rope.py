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
    """Values of each head that are rotated (an even number).

    They are the leading ones, and under latent attention a part of the head of their own.
    """
    latent = config.latent_attention
    dim = (
        int(config.head_size * config.rope_fraction) if latent is None else latent.qk_rope_head_dim
    )
    assert dim % 2 == 0, f"rotated part of a head must be even, is {dim}"
    return dim


def frequencies(
    config: ModelConfig,
    length: int | Tensor = 0,
    *,
    local: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angle per position, float32 [rotary_dim / 2]: theta^(-2i / rotary_dim) (arXiv:2104.09864).

    `length` counts the tokens of the context, which dynamic and longrope scaling depend on; of
    lengths [..., T] each has frequencies of its own, [..., T, rotary_dim / 2], under these two.
    `local` gives the frequencies of the blocks with a sliding window, which are never scaled.
    """
    dim = rotary_dim(config)
    scaling = None if local else config.rope_scaling
    theta = (config.rope_local_theta or config.rope_theta) if local else config.rope_theta
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if scaling is not None and scaling.kind == "dynamic":
        return 1.0 / _dynamic_theta(theta, dim, scaling, length, device) ** exponent
    inverse = 1.0 / (theta**exponent)
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(inverse, theta, dim, scaling)
    if scaling.kind == "longrope":
        return inverse / _longrope_divisors(inverse, scaling, length)
    return _by_wavelength(inverse, scaling)


def _dynamic_theta(
    theta: float,
    dim: int,
    scaling: RopeScaling,
    length: int | Tensor,
    device: torch.device | str | None,
) -> Tensor:
    """The base [..., 1] that spreads the frequencies over `length` tokens (dynamic NTK-aware,
    https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr; also arXiv:2309.00071, section 3.3).

    Unchanged up to the original context. It grows with the context, so keys that were cached in a
    shorter one keep the angles they had.
    """
    original = scaling.original_max_seq_length
    tokens = torch.as_tensor(length, dtype=torch.float64, device=device).clamp(min=original)
    growth = scaling.factor * tokens / original - (scaling.factor - 1)
    return (theta * growth ** (dim / (dim - 2))).float().unsqueeze(-1)


def _yarn(inverse: Tensor, theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """Frequencies by parts (arXiv:2309.00071, section 3.2).

    Dimensions with more than `beta_fast` turns in the original context stay, those with fewer than
    `beta_slow` are divided by `factor`, and the mix runs linearly in the dimension between.
    """

    def dimension(turns: float) -> float:
        length = scaling.original_max_seq_length
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    index = torch.arange(dim // 2, dtype=torch.float32, device=inverse.device)
    stretched = ((index - low) / span).clamp(0.0, 1.0)
    return inverse * (1 - stretched) + inverse / scaling.factor * stretched


def _longrope_divisors(inverse: Tensor, scaling: RopeScaling, length: int | Tensor) -> Tensor:
    """A divisor for each frequency (arXiv:2402.13753): searched for short and for long contexts.

    All positions take the long ones as soon as the context is longer than the original one, so
    keys that were cached before keep the angles they had.
    """
    short, long = (
        torch.tensor(factors or (), dtype=torch.float32, device=inverse.device)
        for factors in (scaling.short_factors, scaling.long_factors)
    )
    assert len(short) == len(long) == len(inverse), (
        f"longrope needs {len(inverse)} factors for short and long contexts"
    )
    tokens = torch.as_tensor(length, device=inverse.device)
    is_long = tokens > scaling.original_max_seq_length
    return torch.where(is_long.unsqueeze(-1), long, short)


def _by_wavelength(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies for a longer context (arXiv:2407.21783, section 3.2).

    Wavelengths longer than original / low_freq_factor are stretched by `factor`, those shorter than
    original / high_freq_factor stay, and between the two the mix runs linearly in 1 / wavelength.
    """
    turns = scaling.original_max_seq_length * inverse / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return inverse * (keep + (1 - keep) / scaling.factor)


def rope_tables(
    config: ModelConfig, positions: Tensor, length: int | Tensor, *, local: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: float32 [..., T, 1, rotary_dim / 2] for positions [..., T].

    The axis of length one is where the heads go. `length` counts the tokens from the start of the
    context to the last position, or to the end of each token's document, int64 [B, T]. `local` asks
    for the blocks with a sliding window. Both carry the `table_factor` of the scaling.
    """
    # Products of two numbers each, which autocast leaves alone: bf16 angles would be wrong by whole
    # turns at long positions.
    inverse = frequencies(config, length, local=local, device=positions.device)
    angles = positions.float().unsqueeze(-1) * inverse
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    scaling = None if local else config.rope_scaling
    if scaling is None or scaling.table_factor == 1.0:
        return cos, sin
    return cos * scaling.table_factor, sin * scaling.table_factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads x [B, T, heads, head_size] rotated, same shape and dtype.

    The two halves of the rotated part form the pairs, as in most Hugging Face models (others are
    brought to that order when they are read); values behind the rotated part pass through.
    Products are taken in fp32.
    """
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(turned, dim=-1).to(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)

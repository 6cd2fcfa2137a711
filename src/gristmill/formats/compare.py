"""Whether a written model is the one it was written from: every tensor, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.models import zoo
from gristmill.util.errors import RunError, UserError

BLOCK = 32
"""Numbers that share a scale in q8_0."""


def compare_weights(
    source: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    rounded: bool = False,
) -> None:
    """Raise RunError unless every tensor of `written` is that of `source` cast to `dtype`.

    Bit for bit, NaN included; with `rounded` within the rounding of q8_0. One tensor at a time.
    """
    if set(source) != set(written):
        raise _wrong(f"tensors {sorted(set(source) ^ set(written))[:3]} are on one side only")
    for name in source:
        value = written[name]
        if rounded:
            same = _near(source[name].float(), value.float())
        else:
            same = _same_bits(source[name].to(dtype), value.to(dtype))
        if not same:
            raise _wrong(f"{name} differs")


def compare_config(source: ModelConfig, written: ModelConfig) -> None:
    """Raise RunError unless both configurations mean the same model.

    Names and special ids may differ, and the weight of the loss that balances experts, for which
    most formats have no word; numbers may be rounded to 32 bits, which GGUF has.
    """
    moe = written.moe
    if moe is not None and source.moe is not None:
        moe = replace(moe, balance_loss=source.moe.balance_loss)
    alike = replace(
        written,
        name=source.name,
        family=source.family,
        num_token_ids=source.num_token_ids,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        moe=moe,
    )
    if alike == source:
        return
    ours, theirs = _words(source), _words(alike)
    if ours is None or theirs is None:  # no architecture has words for one of them
        ours, theirs = asdict(source), asdict(alike)
    wrong = [key for key in ours if not _alike(ours[key], theirs.get(key))]
    if wrong:
        key = wrong[0]
        raise _wrong(f"{key} was {ours[key]} and reads {theirs.get(key)}")


def _words(config: ModelConfig) -> dict[str, Any] | None:
    """The words of its family, in which what has no consequence is the same."""
    try:
        return zoo.family(config.family).to_hf_config(config)
    except UserError:
        return None


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether `b` is `a` rounded to 255 steps in each block of a row, or more finely.

    Half a step is 1/254 of the block's largest value; the scale itself is rounded to 11 bits.
    """
    if a.shape != b.shape:
        return False
    width = a.shape[-1]
    flat_a, flat_b = a.reshape(-1, width), b.reshape(-1, width)
    block = BLOCK if width % BLOCK == 0 else width
    largest = flat_a.abs().view(-1, width // block, block).amax(-1, keepdim=True)
    error = (flat_a - flat_b).abs().view(-1, width // block, block)
    return bool((error <= largest * (0.5 / 127 + 2**-10) + 1e-7).all())


def _wrong(what: str) -> RunError:
    return RunError(
        f"what was written is not the model ({what}), so it was thrown away. "
        "Check the disk and the memory of this machine, and report it if it happens again."
    )

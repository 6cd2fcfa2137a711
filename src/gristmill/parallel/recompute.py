"""Activations that the backward pass computes again instead of finding them in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._functorch.config as compiler
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""Operations of torch whose results `selective` keeps: all that take long."""


def recompute(model: nn.Module, how: str | float) -> None:
    """Make the blocks of a decoder keep less for the backward pass, in place, before compiling.

    none         keeps what the backward pass needs
    selective    keeps results of matrix products and of attention; norms, rotations, activations
                 and sums are made again, which costs next to nothing
    full         keeps the input of each block: its forward pass is made a second time, a third
                 more work (arXiv:1604.06174)
    a number     keeps that share (0 to 1) of what the compiler would, and makes again what is
                 cheapest to make; compiled blocks only

    Loss and gradients stay what they were.
    """
    share = how if isinstance(how, float) else 1.0
    compiler.activation_memory_budget = share  # type: ignore[assignment]
    if how in ("selective", "full"):
        for block in model.layers:
            # A method of the object and not a module around it: names of parameters stay.
            block.forward = _forgetful(
                block.forward, selective=how == "selective", draws=_draws(block)
            )


def _draws(block: nn.Module) -> bool:
    """Whether a block uses random numbers: then the second time it must draw the same."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())


def _forgetful(forward: Any, *, selective: bool, draws: bool) -> Any:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    @functools.wraps(forward)
    def forgetful(*inputs: Any) -> tuple[Tensor, Any]:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, **options)

    return forgetful


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _kept_operations()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _kept_operations() -> frozenset[Any]:
    known = (getattr(torch.ops.aten, name, None) for name in PRODUCTS)
    return frozenset(packet.default for packet in known if packet is not None)

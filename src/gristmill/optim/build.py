"""Settings to an optimizer over parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gristmill.config import sections
from gristmill.util.errors import UserError

# Where torch has AdamW in one pass over memory; on two CPU cores three to five times as fast.
FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def build_optimizer(
    model: nn.Module, cfg: sections.Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a run; each group has `peak_lr`, from which the schedule sets `lr`.

    A settings class of the user's own makes its optimizer in `build(model)`. Raises UserError for
    settings that are neither.
    """
    if hasattr(cfg, "build"):
        built: torch.optim.Optimizer = cfg.build(model)
        for group in built.param_groups:
            group.setdefault("peak_lr", group["lr"])
        return built
    if not isinstance(cfg, sections.AdamW):
        kind = type(cfg)
        raise UserError(
            f"the optimizer {kind.__module__}:{kind.__qualname__} is not known. "
            "Known: AdamW. Set --optimizer AdamW, or give your class a method build(model)."
        )
    return torch.optim.AdamW(
        parameter_groups(model, lr=cfg.lr, weight_decay=cfg.weight_decay),
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        fused=device.type in FUSED_DEVICES,
    )


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; norms, biases and embeddings do not.

    An output head that is the embedding is an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    no_decay = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    grouped = [id(p) for p in decay + no_decay]
    assert len(grouped) == len(set(grouped)) == len(trained), "a parameter is in no or two groups"
    groups = [(decay, weight_decay), (no_decay, 0.0)]
    return [
        {"params": params, "weight_decay": amount, "lr": lr, "peak_lr": lr}
        for params, amount in groups
        if params
    ]

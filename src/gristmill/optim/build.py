"""Settings to an optimizer over parameter groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from gristmill.config import sections
from gristmill.optim.muon import Muon
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
        built.param_groups = [
            {"peak_lr": group["lr"], **group, "params": params}
            for group in built.param_groups
            for params in _by_mesh(group["params"])
        ]
        return built
    if isinstance(cfg, sections.AdamW):
        groups = parameter_groups(model, lr=cfg.lr, weight_decay=cfg.weight_decay)
        return _adamw(groups, cfg, device)
    if isinstance(cfg, sections.Muon):
        return _muon(model, cfg, device)
    kind = type(cfg)
    raise UserError(
        f"the optimizer {kind.__module__}:{kind.__qualname__} is not known. "
        "Known: AdamW, Muon. Set --optimizer AdamW, or give your class a method build(model)."
    )


def _adamw(
    groups: list[dict[str, Any]], cfg: sections.AdamW | sections.Muon, device: torch.device
) -> torch.optim.AdamW:
    fused = device.type in FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)


def _muon(model: nn.Module, cfg: sections.Muon, device: torch.device) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks; AdamW for embeddings, head, router, norms and biases."""
    matrices = block_matrices(model)
    if not matrices:
        raise UserError("--optimizer Muon: the model has no matrices to train. Use AdamW.")
    group = {"params": matrices, "weight_decay": cfg.weight_decay, "lr": cfg.lr, "peak_lr": cfg.lr}
    lr = cfg.lr if cfg.adamw_lr is None else cfg.adamw_lr
    taken = {id(p) for p in matrices}
    others = parameter_groups(model, lr=lr, weight_decay=cfg.weight_decay, without=taken)
    return Muon(
        [group],
        _adamw(others, cfg, device),
        lr=cfg.lr,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        ns_steps=cfg.ns_steps,
        adjust_lr=cfg.adjust_lr,
    )


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trained matrices [out, in] and stacks of experts [E, out, in] of the blocks.

    Not the router: its rows are one vector an expert and not a map from one space to another.
    """
    return [
        p
        for name, p in model.named_parameters()
        if name.startswith("layers.")
        and p.requires_grad
        and p.ndim >= 2
        and not name.endswith(".router.weight")
    ]


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, without: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; norms, biases and embeddings do not.

    An output head that is the embedding is an embedding. Parameters whose id is in `without` are
    somebody else's. Those that lie on processes in different ways have groups of their own.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in without]
    decay = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    no_decay = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    grouped = [id(p) for p in decay + no_decay]
    assert len(grouped) == len(set(grouped)) == len(trained), "a parameter is in no or two groups"
    groups = [(decay, weight_decay), (no_decay, 0.0)]
    return [
        {"params": params, "weight_decay": amount, "lr": lr, "peak_lr": lr}
        for together, amount in groups
        for params in _by_mesh(together)
    ]


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters on each mesh of processes: one operation of torch takes those of one only."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())

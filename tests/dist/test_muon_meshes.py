"""Muon's updates are those of one process on every mesh, as far as its bf16 iteration goes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import CPU, TINY, Case, batch_of, build, parameters_of

from gristmill.config.model import MixtureOfExperts
from gristmill.config.sections import Muon, Parallel
from gristmill.optim.build import block_matrices, build_optimizer
from gristmill.parallel import gradients
from gristmill.parallel.mesh import close_mesh, open_mesh
from gristmill.train.step import update

MESHES = {
    "shard 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "replicate 2": (2, {"replicate": 2}),
    "context 2": (2, {"context": 2}),
    "hybrid 2x2": (4, {"replicate": 2}),
    "tensor 2, shard 2": (4, {"tensor": 2}),
    "context 2, tensor 2": (4, {"context": 2, "tensor": 2}),
}


def moves(case: Case) -> tuple[dict[str, Tensor], bool]:
    """What a step changes in each matrix, and whether a step that is not finite changes nothing."""
    mesh = open_mesh(Parallel(**case.sizes), CPU)
    model, _ = build(case, mesh)
    optimizer = build_optimizer(model, Muon(lr=0.01, weight_decay=0.0), CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = [names[id(p)] for p in block_matrices(model)]
    found = []
    for step, finite in enumerate((True, False)):
        before = parameters_of(model)
        inputs, targets, _ = batch_of(step, case)
        share = len(inputs) // mesh.data_world
        rows = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
        gradients.accumulate(model, last=True)
        (model(inputs[rows], targets[rows]) / int((targets != -100).sum())).backward()
        norm = gradients.total_norm(model) * (1.0 if finite else torch.nan)
        update(optimizer, norm, torch.isfinite(norm), 0.5)
        optimizer.zero_grad(set_to_none=True)
        after = parameters_of(model)
        found.append({name: after[name] - before[name] for name in after})
    close_mesh(mesh)
    return {name: found[0][name] for name in matrices}, not any(m.any() for m in found[1].values())


EXPERTS = dataclasses.replace(TINY, moe=MixtureOfExperts(num_experts=4, intermediate_size=16))


@pytest.mark.parametrize("sizes", [{}, {"replicate": 2}, {"context": 2}], ids=str)
def test_updates_of_experts_are_those_of_one_process(ranks, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    wanted, _ = moves(Case(config=EXPERTS))
    for found, _ in ranks(2, moves, Case(config=EXPERTS, sizes=sizes)):
        for name, move in found.items():
            likeness = F.cosine_similarity(move.flatten(), wanted[name].flatten(), dim=0)
            assert likeness > 0.97, name


@pytest.mark.parametrize("mesh", MESHES)
def test_updates_are_those_of_one_process(ranks, mesh, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    wanted, _ = moves(Case())
    world, sizes = MESHES[mesh]
    for found, skipped in ranks(world, moves, Case(sizes=sizes)):
        assert skipped
        for name, move in found.items():
            likeness = F.cosine_similarity(move.flatten(), wanted[name].flatten(), dim=0)
            assert likeness > 0.97, name

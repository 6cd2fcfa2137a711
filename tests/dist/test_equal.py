"""A model trains alike on one process and on any mesh of processes.

fp32; a sum over processes is taken in another order, which is all that differs.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from training import TINY, Case, Result, alone, train

LOSS, GRADIENT, WEIGHT = 2e-6, 1e-5, 2e-5
"""Tolerances: relative to the loss or norm; to the largest number of a gradient; absolute, where
three steps of AdamW move a number by up to 3e-2."""


def replaced(case: Case, **changes: object) -> Case:
    return dataclasses.replace(case, **changes)


def assert_same(got: Result, wanted: Result) -> None:
    for mine, theirs in ((got.losses, wanted.losses), (got.norms, wanted.norms)):
        assert mine == pytest.approx(theirs, rel=LOSS)
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        far = (gradient - wanted.gradients[name]).abs().max() / wanted.gradients[name].abs().max()
        assert far < GRADIENT, f"gradient of {name}: {far:.1e}"
    for name, weight in got.weights.items():
        assert torch.equal(got.initial[name], wanted.initial[name]), f"{name} starts otherwise"
        far = (weight - wanted.weights[name]).abs().max()
        assert far < WEIGHT, f"{name}: {far:.1e}"


MESHES = {
    "shard 2": (2, {}),
    "shard 4": (4, {}),
    "replicate 2": (2, {"replicate": 2}),
    "hybrid 2x2": (4, {"replicate": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, shard 2": (4, {"tensor": 2}),
    "context 2": (2, {"context": 2}),
    "context 4": (4, {"context": 4}),
    "context 2, shard 2": (4, {"context": 2}),
    "context 2, tensor 2": (4, {"context": 2, "tensor": 2}),
    "context 2, replicate 2": (4, {"context": 2, "replicate": 2}),
    "tensor 2, replicate 2": (4, {"tensor": 2, "replicate": 2}),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_like_one_process(ranks, mesh):
    world, sizes = MESHES[mesh]
    case = Case(steps=3)
    wanted = alone(case)
    for result in ranks(world, train, replaced(case, sizes=sizes)):
        assert_same(result, wanted)


@pytest.mark.parametrize("mesh", ["shard 2", "hybrid 2x2"])
def test_micro_batches_change_nothing(ranks, mesh):
    world, sizes = MESHES[mesh]
    wanted = alone(Case(steps=2))
    assert_same(alone(Case(steps=2, micro_batch_size=1)), wanted)
    for result in ranks(world, train, Case(steps=2, micro_batch_size=1, sizes=sizes)):
        assert_same(result, wanted)


def test_a_tied_embedding_stays_one_parameter(ranks):
    case = Case(config=dataclasses.replace(TINY, tie_embeddings=True), steps=2)
    wanted = alone(case)
    assert "head.weight" not in wanted.weights
    for result in ranks(2, train, case):
        assert_same(result, wanted)

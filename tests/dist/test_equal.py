"""A model trains alike on one process and on any mesh of processes.

fp32; a sum over processes is taken in another order, which is all that differs.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from training import CPU, TINY, Case, Result, alone, batch_of, build, train

from gristmill.config.model import ModelConfig
from gristmill.config.sections import Parallel
from gristmill.formats.hf import write
from gristmill.models.counts import parameter_shapes
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, generate_tokens
from gristmill.models.init import init_weights
from gristmill.parallel.mesh import close_mesh, open_mesh

LOSS, GRADIENT, WEIGHT = 2e-6, 1e-5, 2e-5
"""Tolerances: relative to the loss or norm; to the largest number of a gradient; absolute, where
three steps of AdamW move a number by up to 3e-2."""


def replaced(case: Case, **changes: object) -> Case:
    return dataclasses.replace(case, **changes)


def changed(**changes: object) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


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


THREE_AXES = {
    "replicate 2, shard 2, tensor 2": {"replicate": 2, "tensor": 2},
    "replicate 2, shard 2, context 2": {"replicate": 2, "context": 2},
    "shard 2, context 2, tensor 2": {"context": 2, "tensor": 2},
    "replicate 2, context 2, tensor 2": {"replicate": 2, "context": 2, "tensor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", THREE_AXES)
def test_three_axes_train_like_one_process(ranks, mesh):
    ranks.close()  # torch keeps groups of an earlier mesh, which a run never has
    case = Case(steps=2, documents=True, config=changed(tie_embeddings=True))
    wanted = alone(case)
    for result in ranks(8, train, replaced(case, sizes=THREE_AXES[mesh])):
        assert_same(result, wanted)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_like_one_process(ranks, mesh):
    world, sizes = MESHES[mesh]
    case = Case(steps=3)
    wanted = alone(case)
    for result in ranks(world, train, replaced(case, sizes=sizes)):
        assert_same(result, wanted)


PARTS = {
    "packed documents, z-loss": {"documents": True, "z_loss": 0.01},
    "norms inside heads": {"config": changed(qk_norm="head")},
    "one key-value head each, tied": {"config": changed(tie_embeddings=True, head_dim=12)},
    "windows, caps": {
        "config": changed(
            sliding_window=5,
            sliding_pattern=(True, False),
            rope_local_theta=500.0,
            attention_softcap=3.0,
            logit_softcap=2.0,
            post_norm=True,
            norm_unit_offset=True,
            embedding_scale=5.0,
            tie_embeddings=True,
        )
    },
    "GPT-NeoX": {
        "config": changed(
            norm="layernorm",
            parallel_residual=True,
            mlp="plain",
            activation="gelu",
            num_kv_heads=4,
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            head_bias=True,
            rope_fraction=0.25,
        )
    },
    "GPT-2": {
        "config": changed(
            norm="layernorm",
            positions="learned",
            mlp="plain",
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
            qkv_clip=0.02,
        )
    },
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("mesh", ["tensor 2, shard 2", "context 2, tensor 2"])
def test_parts_of_models_on_meshes(ranks, mesh, parts):
    world, sizes = MESHES[mesh]
    case = Case(steps=2, **PARTS[parts])
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


@pytest.mark.parametrize("mesh", ["shard 2", "context 2, tensor 2"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(ranks, mesh, recompute):
    world, sizes = MESHES[mesh]
    case = Case(steps=2, recompute=recompute, documents=True)
    wanted = alone(replaced(case, recompute="none"))
    assert_same(alone(case), wanted)
    for result in ranks(world, train, replaced(case, sizes=sizes)):
        assert_same(result, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "recompute"),
    [
        *itertools.product(
            ("shard 2", "tensor 2, shard 2", "context 2, tensor 2"), ("none", "selective")
        ),
        ("shard 2", 0.5),
    ],
)
def test_compiled_blocks_change_nothing(ranks, mesh, recompute):
    world, sizes = MESHES[mesh]
    case = Case(steps=2, config=changed(qk_norm="head"), documents=True)
    wanted = alone(case)
    case = replaced(case, compile="auto", recompute=recompute)
    assert_same(alone(case), wanted)
    for result in ranks(world, train, replaced(case, sizes=sizes), timeout_s=600):
        assert result.how.startswith("compiled")
        assert_same(result, wanted)


def storages(case: Case) -> tuple[list[str], bool]:
    """Names of the parameters, and whether embedding and head are one tensor, after everything."""
    mesh = open_mesh(Parallel(**case.sizes), CPU)
    model, _ = build(case, mesh)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    one = model.head_rows is model.embed.weight
    close_mesh(mesh)
    return names, one


@pytest.mark.parametrize("mesh", ["shard 2", "hybrid 2x2", "context 2", "tensor 2, shard 2"])
def test_a_tied_embedding_stays_one_parameter(ranks, mesh):
    world, sizes = MESHES[mesh]
    tied = Case(config=changed(tie_embeddings=True), steps=2, z_loss=0.1)
    for names, one in ranks(world, storages, replaced(tied, sizes=sizes)):
        assert one
        assert names == list(parameter_shapes(tied.config))
    wanted = alone(tied)
    for result in ranks(world, train, replaced(tied, sizes=sizes)):
        assert_same(result, wanted)


@pytest.mark.parametrize("mesh", ["hybrid 2x2", "tensor 2, shard 2"])
def test_weights_of_a_hugging_face_directory_reach_every_mesh(ranks, tmp_path, mesh):
    config = changed(family="llama", num_token_ids=None)
    shapes = parameter_shapes(config)
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    write(tmp_path / "model", config, values, tokenizer_dir=None)
    world, sizes = MESHES[mesh]
    case = Case(config=config, weights=tmp_path / "model", steps=0, sizes=sizes)
    for result in ranks(world, train, case):
        assert result.initial.keys() == values.keys()
        assert all(torch.equal(result.initial[name], values[name]) for name in values)


def logits(case: Case) -> torch.Tensor:
    mesh = open_mesh(Parallel(**case.sizes), CPU)
    model, _ = build(case, mesh)
    with torch.no_grad():
        out = model(batch_of(0, case)[0])
    close_mesh(mesh)
    return out


def test_logits_are_whole_on_every_mesh(ranks):
    with torch.random.fork_rng():
        model = Decoder(TINY)
    init_weights(model, 1)
    wanted = model(batch_of(0, Case())[0]).detach()
    for sizes in ({"tensor": 2}, {"context": 2, "tensor": 2}):
        for got in ranks(4, logits, Case(sizes=sizes)):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", ["shard 2", "hybrid 2x2", "tensor 2, shard 2"])
@pytest.mark.parametrize("parts", ["norms inside heads", "GPT-NeoX"])
def test_mixed_precision_agrees_as_far_as_bf16_goes(ranks, mesh, parts):
    world, sizes = MESHES[mesh]
    case = Case(precision="bf16-mixed", **PARTS[parts])
    wanted = alone(case)
    for result in ranks(world, train, replaced(case, sizes=sizes)):
        assert result.losses == pytest.approx(wanted.losses, rel=1e-4)
        for name, gradient in result.gradients.items():
            assert gradient.dtype == torch.float32
            far = (gradient - wanted.gradients[name]).norm() / wanted.gradients[name].norm()
            assert far < 0.02, f"gradient of {name}: {far:.1e}"


@pytest.mark.parametrize("mesh", ["shard 2", "hybrid 2x2", "tensor 2, shard 2", "context 2"])
def test_weights_in_bf16_agree_as_far_as_that_goes(ranks, mesh):
    world, sizes = MESHES[mesh]
    case = Case(precision="bf16-true")
    wanted = alone(case)
    for result in ranks(world, train, replaced(case, sizes=sizes)):
        assert result.losses == pytest.approx(wanted.losses, rel=5e-3)
        assert all(
            torch.equal(result.initial[name], wanted.initial[name]) for name in wanted.initial
        )
        for name, gradient in result.gradients.items():
            assert gradient.dtype == torch.bfloat16
            far = (gradient - wanted.gradients[name]).norm() / wanted.gradients[name].norm()
            assert far < 0.05, f"gradient of {name}: {far:.1e}"


def written(case: Case) -> list[int]:
    """Ids that the model finds likeliest after a few others, with a cache of keys and values."""
    mesh = open_mesh(Parallel(**case.sizes), CPU)
    model, _ = build(case, mesh)
    with torch.no_grad():
        ids = list(
            generate_tokens(Context(model.eval()), [5, 6, 7], max_new_tokens=8, temperature=0.0)
        )
    close_mesh(mesh)
    return ids


@pytest.mark.parametrize("mesh", ["shard 2", "tensor 2, shard 2", "context 2, tensor 2"])
def test_every_mesh_writes_the_same(ranks, monkeypatch, mesh):
    world, sizes = MESHES[mesh]
    monkeypatch.setenv("WORLD_SIZE", "1")
    wanted = written(Case())
    assert len(wanted) == 8
    assert ranks(world, written, Case(sizes=sizes)) == [wanted] * world

"""Who is who on a mesh, what ranks tell each other, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from training import CPU, ROWS, TINY, Case, Result, alone, batch_of, build, train

from gristmill.config.model import LatentAttention, MixtureOfExperts, RopeScaling
from gristmill.config.sections import Parallel
from gristmill.parallel.check import check_mesh
from gristmill.parallel.gradients import clip, total_norm
from gristmill.parallel.mesh import Mesh, close_mesh, open_mesh, resolve_sizes
from gristmill.util.errors import UserError


def changed(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("parallel", "world", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 8, (1, 8, 1, 1)),
        ({"replicate": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"shard": 1, "context": 4}, 4, (1, 1, 4, 1)),
        ({"shard": 4, "replicate": 2}, 8, (2, 4, 1, 1)),
    ],
)
def test_sizes_multiply_to_the_world(parallel, world, sizes):
    assert tuple(resolve_sizes(Parallel(**parallel), world).values()) == sizes


@pytest.mark.parametrize(
    ("parallel", "world"),
    [({"tensor": 3}, 4), ({"shard": 2}, 4), ({"context": 0}, 4), ({"replicate": 2}, 1)],
)
def test_sizes_that_do_not_are_refused(parallel, world):
    with pytest.raises(UserError, match="--parallel"):
        resolve_sizes(Parallel(**parallel), world)


def test_places_are_told_apart():
    sizes = {"replicate": 2, "shard": 2, "context": 2, "tensor": 2}
    places = [Mesh(sizes, rank=rank) for rank in range(16)]
    assert [m.place["tensor"] for m in places[:4]] == [0, 1, 0, 1]
    assert [m.context_rank for m in places[:4]] == [0, 0, 1, 1]
    assert [m.data_rank for m in places] == [n // 4 for n in range(16)]
    assert {(m.data_world, m.context_world) for m in places} == {(4, 2)}


def talk(sizes):
    mesh = open_mesh(Parallel(**sizes), CPU)
    said = (
        mesh.sum(torch.tensor(float(2**mesh.rank))).item(),
        mesh.sum_rows(torch.tensor(10 * mesh.data_rank + 1)).item(),
        mesh.any(mesh.rank == 1),
        mesh.any(False),
        mesh.main_says({"step": mesh.rank}),
    )
    mesh.barrier()
    close_mesh(mesh)
    return said


@pytest.mark.parametrize(
    ("sizes", "sums", "rows"),
    [
        ({}, [15.0] * 4, 64),
        ({"tensor": 2}, [5.0, 10.0, 5.0, 10.0], 12),
        ({"context": 2}, [15.0] * 4, 12),
        ({"context": 2, "tensor": 2}, [5.0, 10.0, 5.0, 10.0], 1),
        ({"replicate": 2, "tensor": 2}, [5.0, 10.0, 5.0, 10.0], 12),
    ],
)
def test_ranks_agree(ranks, sizes, sums, rows):
    for said, total in zip(ranks(4, talk, sizes), sums, strict=True):
        assert said == (total, rows, True, False, {"step": 0})


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    mesh = open_mesh(Parallel(), CPU)
    assert mesh.device_mesh is mesh.fsdp is mesh.tensor is mesh.context is None
    assert mesh.is_main
    assert mesh.main_says(3) == 3
    assert not torch.distributed.is_initialized()


def norms_with_a_bad_number(sizes):
    """The norm on this rank when one rank's rows make one number of one gradient infinite."""
    mesh = open_mesh(Parallel(**sizes), CPU)
    model, _ = build(Case(), mesh)
    inputs, targets, _ = batch_of(0, Case())
    share = ROWS // mesh.data_world
    mine = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    loss = model(inputs[mine], targets[mine])
    (loss * (torch.inf if mesh.rank == 1 else 1.0)).backward()
    norm = total_norm(model).item()
    close_mesh(mesh)
    return norm


@pytest.mark.parametrize("sizes", [{}, {"replicate": 2}, {"tensor": 2}, {"context": 2}])
def test_a_gradient_that_is_no_number_is_seen_by_all_ranks(ranks, sizes):
    for norm in ranks(4, norms_with_a_bad_number, sizes):
        assert not torch.isfinite(torch.tensor(norm))


def test_clipping_makes_the_norm_what_was_asked_for():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    clip([weight], 1.0, torch.tensor(5.0))
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8, 0.0]))
    clip([weight], 2.0, weight.grad.norm())
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8, 0.0]))


MOE = MixtureOfExperts(num_experts=4, intermediate_size=16)
LATENT = LatentAttention(
    kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
)
SCALED = RopeScaling(kind="dynamic", factor=2.0)


@pytest.mark.parametrize(
    ("changes", "sizes", "why"),
    [
        ({}, {"tensor": 4}, "num_kv_heads 2"),
        ({"intermediate_size": 49}, {"tensor": 2}, "intermediate_size 49"),
        ({"qk_norm": "full"}, {"tensor": 2}, "norms over all heads"),
        ({"moe": MOE}, {"tensor": 2}, "experts"),
        ({"vocab_size": 99, "num_token_ids": 40}, {"tensor": 2}, "too few"),
        ({"moe": dataclasses.replace(MOE, balance_loss=0.1)}, {"context": 2}, "balancing"),
        ({"rope_scaling": SCALED}, {"context": 2}, "rotary"),
        ({"num_kv_heads": 4, "latent_attention": LATENT}, {"tensor": 2}, "latent"),
    ],
)
def test_what_no_test_runs_is_refused(changes, sizes, why):
    config = changed(**changes)
    check_mesh(config, {"shard": 8, "replicate": 2})
    with pytest.raises(UserError, match=why):
        check_mesh(config, sizes)


def test_rows_that_cannot_be_cut_are_refused():
    check_mesh(TINY, {"context": 4}, seq_len=32)
    with pytest.raises(UserError, match="30 tokens") as refused:
        check_mesh(TINY, {"context": 4}, seq_len=30)
    assert refused.value.fix == {"--train.max_seq_length": 24}


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"moe": MOE}, {}),
        ({"moe": MOE}, {"replicate": 2}),
        ({"moe": MOE}, {"context": 2}),
        ({"num_kv_heads": 4, "latent_attention": LATENT}, {}),
        ({"num_kv_heads": 4, "latent_attention": LATENT}, {"context": 2}),
        ({"qk_norm": "full"}, {"context": 2}),
    ],
)
def test_experts_and_latent_attention_on_meshes(ranks, changes, sizes):
    case = Case(config=changed(**changes))
    wanted: Result = alone(case)
    for result in ranks(2, train, dataclasses.replace(case, sizes=sizes)):
        assert result.losses == pytest.approx(wanted.losses, rel=2e-6)
        assert result.norms == pytest.approx(wanted.norms, rel=1e-5)
        for name, gradient in result.gradients.items():
            torch.testing.assert_close(gradient, wanted.gradients[name], rtol=1e-4, atol=1e-6)

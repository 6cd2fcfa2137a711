"""Torch's Muon for matrices, each expert's apart, AdamW for the rest; one optimizer to users."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gristmill.checkpoint.load import load
from gristmill.checkpoint.save import Checkpointer
from gristmill.checkpoint.state import optimizer_state
from gristmill.checkpoint.store import step_path
from gristmill.config import sections
from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.optim.build import block_matrices, build_optimizer
from gristmill.optim.muon import orthogonal
from gristmill.train.step import update

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=64,
    max_seq_length=16,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    qk_norm="head",
)
MOE = MixtureOfExperts(num_experts=4, num_experts_per_token=2, intermediate_size=16)
SETTINGS = sections.Muon(lr=0.02, adamw_lr=0.01, weight_decay=0.3)


def build(config=CONFIG, settings=SETTINGS):
    model = Decoder(config)
    init_weights(model, 0)
    return model, build_optimizer(model, settings, CPU)


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def steps(model, optimizer, seeds, norm=1.0, max_norm=None, finite=True):
    for seed in seeds:
        give_gradients(model, seed)
        update(optimizer, torch.tensor(norm), torch.tensor(finite), max_norm)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_matrices_of_blocks_are_orthogonalised_and_nothing_else():
    model, optimizer = build(dataclasses.replace(CONFIG, moe=MOE))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in block_matrices(model)}
    of_a_block = ["attn.q", "attn.k", "attn.v", "attn.o"]
    of_a_block += [f"mlp.experts.{name}" for name in ("gate", "up", "down")]
    assert matrices == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in of_a_block}
    grouped = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    steps(model, optimizer, range(1))
    keys = {key: set(optimizer.state[p]) for p, key in ((p, names[id(p)]) for p in optimizer.state)}
    for name, found in keys.items():
        assert found == (
            {"momentum_buffer"} if name in matrices else {"step", "exp_avg", "exp_avg_sq"}
        )


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_torchs_muon_and_adamw(adjust_lr, nesterov):
    settings = dataclasses.replace(SETTINGS, adjust_lr=adjust_lr, nesterov=nesterov)
    model, optimizer = build(settings=settings)
    reference, _ = build()
    matrices = block_matrices(reference)
    taken = {id(p) for p in matrices}
    muon = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=adjust_lr
    )
    embedding = reference.embed.weight
    rest = [p for p in reference.parameters() if id(p) not in taken]
    decays = [p for p in rest if p.ndim == 2 and p is not embedding]
    groups = [{"params": decays}, {"params": [p for p in rest if p.ndim < 2 or p is embedding]}]
    groups[1]["weight_decay"] = 0.0
    adamw = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3, betas=(0.9, 0.95), fused=True)
    for seed in range(3):
        give_gradients(reference, seed)
        muon.step()
        adamw.step()
    steps(model, optimizer, range(3))
    found = weights(model)
    for name, expected in weights(reference).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_each_expert_is_a_matrix():
    stack = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    for one, many in zip(stack, orthogonal(stack, 5), strict=True):
        torch.testing.assert_close(orthogonal(one.unsqueeze(0), 5)[0], many)
        singular = torch.linalg.svdvals(many.float())
        assert singular.min() > 0.5
        assert singular.max() < 1.4
    model, optimizer = build(dataclasses.replace(CONFIG, moe=MOE))
    give_gradients(model, 0)
    experts = model.layers[0].mlp.experts.up.weight
    before, gradient = experts.detach().clone(), experts.grad.clone()
    optimizer.step()
    alone = torch.nn.Parameter(before[1].clone())
    alone.grad = gradient[1]
    torch.optim.Muon([alone], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(experts[1].detach(), alone.detach(), rtol=1e-5, atol=1e-5)


def test_clipping_scales_what_enters_the_momentum():
    (clipped, optimizer), (scaled, other) = build(), build()
    steps(clipped, optimizer, [1], norm=4.0, max_norm=1.0)
    give_gradients(scaled, 1)
    for p in scaled.parameters():
        p.grad /= 4.0
    update(other, torch.tensor(1.0), torch.tensor(True), None)
    ours, theirs = optimizer_state(clipped, optimizer), optimizer_state(scaled, other)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_changes_no_bit(first):
    model, optimizer = build()
    if not first:
        steps(model, optimizer, range(2))
    before = weights(model)
    state = {name: value.clone() for name, value in optimizer_state(model, optimizer).items()}
    give_gradients(model, 5)
    for p in model.parameters():
        p.grad.flatten()[0] = torch.nan
    update(optimizer, torch.tensor(torch.nan), torch.tensor(False), 1.0)
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, value in optimizer_state(model, optimizer).items():
        assert torch.equal(value, state.get(name, torch.zeros_like(value))), name


def test_saved_and_loaded_it_goes_on_with_the_same_bits(tmp_path):
    whole, first, second = build(), build(), build()
    steps(*whole, range(6))
    steps(*first, range(3))
    checkpointer = Checkpointer(tmp_path, config=CONFIG)
    checkpointer.save(3, *first, {})
    checkpointer.wait()
    assert not checkpointer.failed
    steps(*second, range(50, 52))  # a state of its own, to be replaced
    load(step_path(tmp_path, 3), *second)
    steps(*second, range(3, 6))
    expected = weights(whole[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(second[0]).items())


def test_the_schedule_moves_both_parts():
    _, optimizer = build()
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.01]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert all(group["lr"] == 0.0 for group in optimizer._others.param_groups)

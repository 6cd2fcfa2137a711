"""Recomputation keeps loss and gradients, and less memory between forward and backward pass."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch._functorch.config as compiler
from torch.autograd.graph import saved_tensors_hooks

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.models import counts
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.parallel.mesh import Mesh
from gristmill.parallel.parallelize import parallelize
from gristmill.train.memory import check_recompute, fit_memory
from gristmill.util.errors import UserError

CPU = torch.device("cpu")
DENSE = ModelConfig(
    vocab_size=64,
    max_seq_length=256,
    num_layers=4,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=160,
)
MOE = MixtureOfExperts(num_experts=4, num_experts_per_token=2, intermediate_size=32)


@pytest.fixture(autouse=True)
def budget():
    """The compiler's setting as it was."""
    yield
    compiler.activation_memory_budget = 1.0


def build(config, recompute, compile="off"):
    model = Decoder(config).train()
    init_weights(model, 0)
    parallelize(model, Mesh(), CPU, compile=compile, recompute=recompute)
    return model


def batch_of(rows, length):
    tokens = torch.randint(0, 64, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(model, precision):
    inputs, targets = batch_of(2, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = model(inputs, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def live_storages():
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.device == CPU]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def kept_bytes(model, precision):
    """What exists between the forward and the backward pass and did not before."""
    inputs, _ = batch_of(4, 256)
    before = {t.untyped_storage().data_ptr() for t in (inputs, *model.parameters())}
    # The hooks hold what is saved as objects of Python, which can be counted.
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    gc.freeze()  # the objects of a long session are not looked through
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor), mixed:
        hidden = model.hidden(inputs)
    gc.collect()
    after = live_storages()
    gc.unfreeze()
    assert hidden.requires_grad
    copies = sum(2 * p.numel() for p in model.parameters() if p.ndim == 2)
    autocast = copies if precision == "bf16-mixed" else 0
    return sum(size for place, size in after.items() if place not in before) - autocast


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("experts", [None, MOE])
def test_eager_gradients_are_the_same_bits(how, precision, experts):
    config = dataclasses.replace(DENSE, moe=experts)
    expected_loss, expected = loss_and_gradients(build(config, "none"), precision)
    loss, found = loss_and_gradients(build(config, how), precision)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["selective", "full", 0.3])
def test_compiled_gradients_agree(how):
    config = dataclasses.replace(DENSE, num_layers=2)
    torch.compiler.reset()
    expected_loss, expected = loss_and_gradients(build(config, "none", "auto"), "32-true")
    torch.compiler.reset()
    loss, found = loss_and_gradients(build(config, how, "auto"), "32-true")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
def test_less_is_kept_as_the_planner_says(precision):
    kept = {how: kept_bytes(build(DENSE, how), precision) for how in ("none", "selective", "full")}
    assert kept["full"] < 0.2 * kept["none"]
    assert kept["full"] < kept["selective"] < 0.75 * kept["none"]
    one_block = counts._block_bytes(DENSE, precision) * 4 * 256
    for how in ("selective", "full"):
        # The planner counts the one block that the backward pass makes again.
        planned = counts.activation_bytes(DENSE, 4, 256, precision, how) - one_block
        assert 0.8 < planned / kept[how] < 1.25


def test_a_share_goes_from_full_to_none():
    sizes = [
        counts.activation_bytes(DENSE, 1, 256, "32-true", how) for how in ("full", 0.0, 0.5, 1.0)
    ]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]


def fit(budget, micro=None, recompute="auto"):
    return fit_memory(
        DENSE,
        seq_len=256,
        most=64,
        precision="32-true",
        budget_bytes=budget,
        micro_batch=micro,
        recompute=recompute,
    )


def need(micro, how):
    return counts.training_memory_bytes(DENSE, micro, 256, "32-true", how)


def test_auto_is_the_least_recomputation_that_fits():
    assert fit(need(64, "none")) == (64, "none")
    assert fit(need(64, "none") - 1) == (32, "none")
    assert fit(need(8, "none")) == (8, "none")  # 2,048 tokens keep a device busy
    micro, how = fit(need(8, "none") - 1)
    assert how == "selective"
    assert micro >= 8
    assert fit(need(8, "full"))[1] == "full"
    assert fit(0) == (1, "full")
    assert fit(need(16, "none") - 1, micro=16) == (16, "selective")
    assert fit(need(16, "none") - 1, recompute="none") == (8, "none")
    assert fit(need(64, "full"), recompute="full") == (64, "full")


def test_what_nothing_would_honour_is_refused():
    with pytest.raises(UserError, match="not a share"):
        check_recompute(1.5, "auto")
    with pytest.raises(UserError, match="only the compiler"):
        check_recompute(0.5, "off")
    with pytest.raises(UserError, match="needs compiled blocks"):
        build(DENSE, 0.5, "off")


def test_devices_that_share_the_model_have_room_for_more():
    shared = {"replicate": 1, "shard": 8, "context": 1, "tensor": 1}
    budget = counts.training_memory_bytes(DENSE, 8, 256, "32-true", "none", shared)
    options = {"seq_len": 256, "most": 8, "precision": "32-true", "micro_batch": None}
    options |= {"budget_bytes": budget, "recompute": "auto"}
    assert fit_memory(DENSE, **options, mesh=shared) == (8, "none")
    assert fit_memory(DENSE, **options) != (8, "none")

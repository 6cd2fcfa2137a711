"""What a step does to the weights does not depend on how the batch is cut; bad steps do nothing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.config.sections import AdamW, TrainArgs
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.models.loss import IGNORE
from gristmill.optim.build import build_optimizer
from gristmill.train.batch import TokenBatch
from gristmill.train.step import reseed, train_step

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=64,
    max_seq_length=16,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
)


def build():
    model = Decoder(CONFIG)
    init_weights(model, 0)
    return model, build_optimizer(model, AdamW(lr=0.01), CPU)


def batch_of(rows=4, valid=None):
    tokens = torch.randint(0, 64, (rows, 17), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(rows, dtype=torch.bool) if valid is None else torch.tensor(valid)
    targets = tokens[:, 1:].masked_fill(~valid[:, None], IGNORE)
    return TokenBatch(tokens[:, :-1], targets, int(valid.sum()) * 16)


def job(micro, precision="32-true"):
    train = TrainArgs(max_norm=1.0)
    return SimpleNamespace(
        micro_batch_size=micro, precision=precision, cfg=SimpleNamespace(train=train)
    )


def weights_after(batch, micro, steps=3):
    model, optimizer = build()
    stats = [train_step(model, optimizer, batch, job(micro)) for _ in range(steps)]
    return model.state_dict(), stats


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_do_not_change_the_step(micro):
    whole, stats = weights_after(batch_of(), 4)
    parts, part_stats = weights_after(batch_of(), micro)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    assert part_stats[-1].loss == pytest.approx(stats[-1].loss, rel=1e-5)
    assert part_stats[0].grad_norm == pytest.approx(stats[0].grad_norm, rel=1e-5)


def test_padding_rows_do_not_change_the_step():
    clean, stats = weights_after(TokenBatch(*_first(batch_of(), 3)), 3)
    padded, padded_stats = weights_after(batch_of(valid=[True, True, True, False]), 4)
    for name in clean:
        torch.testing.assert_close(padded[name], clean[name], rtol=1e-4, atol=1e-5)
    assert padded_stats[0].loss == pytest.approx(stats[0].loss, rel=1e-6)


def _first(batch, rows):
    return batch.inputs[:rows], batch.targets[:rows], rows * 16


def test_the_loss_is_the_mean_over_targets_and_falls():
    _, stats = weights_after(batch_of(), 4, steps=12)
    assert stats[0].loss == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.3)
    assert stats[-1].loss < stats[0].loss - 0.3


def test_a_step_that_is_not_finite_changes_nothing():
    model, optimizer = build()
    train_step(model, optimizer, batch_of(), job(4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = {k: v.clone() for s in optimizer.state.values() for k, v in s.items()}
    model.norm.weight.data[0], kept = float("nan"), model.norm.weight.data[0].clone()
    stats = train_step(model, optimizer, batch_of(), job(4))
    model.norm.weight.data[0] = kept
    assert not stats.finite
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    after = {k: v for s in optimizer.state.values() for k, v in s.items()}
    assert all(torch.equal(after[k], moments[k]) for k in moments)
    assert train_step(model, optimizer, batch_of(), job(4)).finite


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 100.0, None])
def test_clipping_inside_the_fused_update_is_clipping(max_norm):
    limited = job(4)
    limited.cfg.train.max_norm = max_norm
    (model, optimizer), (other, plain) = build(), build()
    for group in plain.param_groups:
        group["fused"], group["foreach"] = False, False
    plain.defaults["fused"] = False
    for _ in range(3):
        stats = train_step(model, optimizer, batch_of(), limited)
        train_step(other, plain, batch_of(), limited)
    assert stats.grad_norm > 0.1
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)
    # The first moment is linear in the clipped gradient, so it shows the scale that was used.
    first = optimizer.state[model.embed.weight]["exp_avg"].norm().item()
    assert first == pytest.approx(
        plain.state[other.embed.weight]["exp_avg"].norm().item(), rel=0.01
    )


def test_mixed_precision_stays_near_fp32_and_keeps_fp32_weights():
    model, optimizer = build()
    mixed = train_step(model, optimizer, batch_of(), job(4, "bf16-mixed"))
    exact = train_step(*build(), batch_of(), job(4))
    assert mixed.loss == pytest.approx(exact.loss, rel=0.01)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_biases_make_the_load_of_experts_even():
    experts = MixtureOfExperts(
        num_experts=8, intermediate_size=16, score="sigmoid", selection_bias=True
    )
    batch = batch_of(8)
    worst = {}
    for speed in (0.0, 0.02):
        model = Decoder(replace(CONFIG, moe=experts))
        init_weights(model, 0)
        with torch.no_grad():
            for block in model.layers:
                block.mlp.router.weight.mul_(10)
                block.mlp.selection_bias[:2] = 0.5  # favourites of nearly all tokens
        optimizer = build_optimizer(model, AdamW(lr=1e-6), CPU)
        settings = job(3)
        settings.bias_update_speed = speed
        for _ in range(60):
            train_step(model, optimizer, batch, settings)
        settings.micro_batch_size = 8
        train_step(model, optimizer, batch, settings)
        assert model.visits.sum() == 2 * 2 * batch.num_targets
        share = model.visits / model.visits.float().mean(-1, keepdim=True)
        worst[speed] = share.max().item() - 1  # MaxVio of arXiv:2408.15664
    assert worst[0.0] > 1.0
    assert worst[0.02] < 0.4


def test_a_step_that_is_left_out_moves_no_bias():
    experts = MixtureOfExperts(num_experts=4, intermediate_size=16, selection_bias=True)
    model = Decoder(replace(CONFIG, moe=experts))
    init_weights(model, 0)
    optimizer = build_optimizer(model, AdamW(lr=0.01), CPU)
    settings = job(4)
    settings.bias_update_speed = 0.1
    stats = train_step(model, optimizer, batch_of(), settings, most_loss=0.0)
    assert stats.spike
    assert not any(block.mlp.selection_bias.any() for block in model.layers)
    train_step(model, optimizer, batch_of(), settings)
    assert all(block.mlp.selection_bias.any() for block in model.layers)


def test_randomness_is_a_function_of_seed_and_step():
    def draw(seed, step):
        reseed(seed, step)
        return torch.rand(3)

    assert torch.equal(draw(1, 5), draw(1, 5))
    assert not torch.equal(draw(1, 5), draw(1, 6))
    assert not torch.equal(draw(1, 5), draw(2, 5))

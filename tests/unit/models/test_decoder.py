from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gristmill.config.model import ModelConfig
from gristmill.models.cache import KVCache
from gristmill.models.counts import parameter_shapes
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.util.errors import UserError

SEQUENTIAL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    tie_embeddings=True,
)
PARALLEL = ModelConfig(
    vocab_size=64,
    num_token_ids=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=64,
    norm="layernorm",
    mlp="plain",
    activation="gelu",
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    rope_fraction=0.25,
)
WIDE_HEADS = replace(SEQUENTIAL, head_dim=16, num_kv_heads=1, tie_embeddings=False)
CONFIGS = pytest.mark.parametrize(
    "config", [SEQUENTIAL, PARALLEL, WIDE_HEADS], ids=["sequential", "parallel", "wide_heads"]
)


def built(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose biases and norms are not at their neutral initial values."""
    with torch.device("meta"):
        model = Decoder(config)
    model.to(dtype).to_empty(device="cpu")
    init_weights(model, seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 * torch.randn(parameter.shape, generator=noise)).to(dtype)
    return model


def tokens_of(config: ModelConfig, length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.token_ids, (2, length), generator=generator)


@CONFIGS
def test_parameters_have_the_names_and_shapes_of_the_table(config):
    with torch.device("meta"):
        model = Decoder(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == parameter_shapes(config)
    assert list(shapes) == list(parameter_shapes(config))
    assert set(model.state_dict()) == set(shapes), "no buffers in a checkpoint"
    assert all(p.is_meta for p in model.parameters())


@CONFIGS
def test_later_tokens_change_nothing_before_them(config):
    model, tokens = built(config), tokens_of(config)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.token_ids
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().amax(-1).min() > 1e-4


@CONFIGS
def test_loss_is_the_summed_cross_entropy_of_the_logits(config):
    model, tokens = built(config), tokens_of(config)
    targets = tokens.roll(-1, 1)
    targets[0, 5:8] = -100
    logits = model(tokens)
    assert logits.shape == (2, 17, config.token_ids)
    loss = model(tokens, targets)
    flat = logits.flatten(0, 1)
    expected = F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected)
    counted = targets.flatten() != -100
    extra = 0.01 * flat.logsumexp(-1).square()[counted].sum()
    torch.testing.assert_close(model(tokens, targets, z_loss=0.01), expected + extra)


@CONFIGS
def test_every_parameter_has_a_gradient(config):
    model, tokens = built(config), tokens_of(config)
    model(tokens, tokens.roll(-1, 1)).backward()
    # A key bias adds the same to every score of a query: softmax takes it out again.
    still = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or (p.grad.abs().max() == 0 and not name.endswith("k.bias"))
    ]
    assert not still


def test_rows_behind_the_token_ids_never_matter():
    model, tokens = built(PARALLEL), tokens_of(PARALLEL)
    before = model(tokens, tokens)
    before.backward()
    assert model.head.weight.grad[61:].abs().max() == 0
    with torch.no_grad():
        model.head.weight[61:] = 1e4
        model.embed.weight[61:] = 1e4
    assert torch.equal(model(tokens, tokens), before)
    assert model(tokens).shape[-1] == 61


def test_tied_embedding_is_one_parameter_with_both_gradients():
    config = replace(SEQUENTIAL, num_layers=0)
    model, tokens = built(config), tokens_of(config)
    assert "head.weight" not in dict(model.named_parameters())
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    inputs = model.embed.weight.detach().clone().requires_grad_()
    outputs = model.embed.weight.detach().clone().requires_grad_()
    hidden = model.norm(F.embedding(tokens, inputs))
    logits = F.linear(hidden, outputs).flatten(0, 1)
    F.cross_entropy(logits, tokens.roll(-1, 1).flatten(), reduction="sum").backward()
    torch.testing.assert_close(model.embed.weight.grad, inputs.grad + outputs.grad)


@CONFIGS
def test_cached_decoding_equals_the_full_forward(config):
    model, tokens = built(config), tokens_of(config)
    with torch.no_grad():
        full = model(tokens)
        cache = KVCache(config, 2, 20)
        pieces = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:9], cache=cache)]
        pieces += [model(tokens[:, i : i + 1], cache=cache) for i in range(9, 17)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=1e-5)


@CONFIGS
def test_cache_forgets_what_lies_behind_its_length(config):
    model, tokens = built(config), tokens_of(config)
    with torch.no_grad():
        full = model(tokens)
        cache = KVCache(config, 2, 20)
        model(tokens.roll(3, 1), cache=cache)
        cache.length = 0
        model(tokens[:, :8], cache=cache, num_logits=1)
        model(tokens[:, :4], cache=cache, num_logits=1)
        cache.length = 8
        last = model(tokens[:, 8:], cache=cache, num_logits=1)
    torch.testing.assert_close(last, full[:, -1:], atol=2e-5, rtol=1e-5)


def test_positions_are_counted_from_where_they_are_said_to_start():
    model, tokens = built(SEQUENTIAL), tokens_of(SEQUENTIAL)
    positions = torch.arange(17).expand(2, 17)
    with torch.no_grad():
        plain = model(tokens)
        torch.testing.assert_close(model(tokens, positions=positions), plain)
        # Rotary angles are relative: moving every position by the same step changes nothing.
        moved = model(tokens, positions=positions + 5)
        torch.testing.assert_close(moved, plain, atol=1e-4, rtol=1e-4)
        stretched = model(tokens, positions=positions * 3)
    assert (stretched - plain).abs().max() > 1e-2


@torch.no_grad()
def test_more_tokens_than_learned_positions_are_refused():
    model = built(replace(PARALLEL, name="small", positions="learned", max_seq_length=16))
    tokens = tokens_of(PARALLEL)
    refused = r"small has learned positions for 16 tokens, and 17 were given. Give at most 16"
    with pytest.raises(UserError, match=refused):
        model(tokens, tokens)
    cache = KVCache(model.config, 2, 20)
    model(tokens[:, :16], cache=cache)
    with pytest.raises(UserError, match=refused):
        model(tokens[:, 16:], cache=cache)


def test_num_logits_are_the_last_ones():
    model, tokens = built(SEQUENTIAL), tokens_of(SEQUENTIAL)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, num_logits=3), model(tokens)[:, -3:])


def test_bf16_weights_compute_in_bf16():
    model, tokens = built(SEQUENTIAL, torch.bfloat16), tokens_of(SEQUENTIAL)
    exact = built(SEQUENTIAL)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    assert model(tokens).dtype is torch.bfloat16
    loss = model(tokens, tokens.roll(-1, 1))
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, exact(tokens, tokens.roll(-1, 1)), rtol=1e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_compiled_blocks_equal_eager_without_graph_breaks(config):
    tokens = tokens_of(config)
    eager, compiled = built(config), built(config)
    for block in compiled.layers:
        block.compile(fullgraph=True)
    targets = tokens.roll(-1, 1)
    losses = [model(tokens, targets) for model in (eager, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)

from dataclasses import replace

import pytest
import torch

from gristmill.config.model import LatentAttention as Widths
from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models.cache import KVCache, kv_cache_bytes
from gristmill.models.counts import parameter_shapes
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context
from gristmill.models.init import init_weights
from gristmill.models.kernels import FewRowsLinear
from gristmill.models.latent import LatentAttention
from gristmill.models.rope import apply_rope, rope_tables

WIDTHS = Widths(
    kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
)
NARROW = ModelConfig(
    vocab_size=64,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    intermediate_size=48,
    max_seq_length=64,
    latent_attention=WIDTHS,
)
CONFIGS = {
    "narrow": NARROW,
    "direct": replace(NARROW, latent_attention=replace(WIDTHS, q_lora_rank=None)),
    "scaled": replace(NARROW, attention_scale=0.5, attention_softcap=2.0),
    "still": replace(NARROW, rope_pattern=(False, True)),
    # So narrow in the middle that expanding never pays.
    "always": replace(NARROW, latent_attention=replace(WIDTHS, kv_lora_rank=6)),
    "yarn": replace(NARROW, rope_scaling=RopeScaling(kind="yarn", factor=4.0, mscale=0.7)),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def build(config, dtype=torch.float32):
    model = Decoder(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far enough from uniform that an error shows
    return model.to(dtype).eval()


def tokens(count=40, rows=2):
    return torch.randint(0, 64, (rows, count), generator=torch.Generator().manual_seed(2))


def written_out(layer, x, cos, sin, widths):
    """Section 2.1 of the paper, a head and a token at a time."""
    heads, nope, rank = layer.heads, widths.qk_nope_head_dim, widths.kv_lora_rank
    queries = (
        layer.q(x) if widths.q_lora_rank is None else layer.q_up(layer.q_norm(layer.q_down(x)))
    )
    down = layer.kv_down(x)
    latents = layer.kv_norm(down[..., :rank])
    shared = apply_rope(down[..., rank:].unsqueeze(2), cos, sin)[:, :, 0]
    rows = []
    for token in range(x.shape[1]):
        parts = []
        for head in range(heads):
            q = queries.unflatten(-1, (heads, -1))[:, token, head]
            turned = apply_rope(q[:, None, None, nope:], cos[token], sin[token])[:, 0, 0]
            up = layer.kv_up.weight.unflatten(0, (heads, -1))[head]
            seen = latents[:, : token + 1]
            plain_scores = torch.einsum("bd,btd->bt", q[:, :nope], seen @ up[:nope].T)
            scores = plain_scores + torch.einsum("bd,btd->bt", turned, shared[:, : token + 1])
            weights = (scores * layer.scale).softmax(-1)
            parts.append(torch.einsum("bt,btd->bd", weights, seen @ up[nope:].T))
        rows.append(torch.cat(parts, -1))
    return layer.o(torch.stack(rows, 1))


@pytest.mark.parametrize("name", ["narrow", "direct"])
def test_it_is_the_formula(name):
    config = CONFIGS[name]
    layer = build(config, torch.float64).layers[0].attn
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    tables = rope_tables(config, torch.arange(9), 9)
    expected = written_out(layer, x, *tables, config.latent_attention)
    torch.testing.assert_close(layer(x, *tables), expected, atol=1e-6, rtol=1e-5)


def test_parameters_are_those_that_are_counted(config):
    found = {name: tuple(p.shape) for name, p in build(config).named_parameters()}
    assert found == parameter_shapes(config)


@pytest.mark.parametrize("lengths", [[40], [1] * 40, [20, 1, 5, 1, 13], [1, 39], [13, 12, 15]])
def test_decoding_with_a_cache_is_the_full_forward_pass(config, lengths):
    model = build(config, torch.float64)
    with torch.no_grad():
        expected = model(tokens())
        cache = KVCache(config, 2, 40, dtype=torch.float64)
        parts = [model(part, cache=cache) for part in tokens().split(lengths, dim=1)]
    # Rotation is in fp32, whatever the precision.
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_the_cache_holds_one_small_vector_for_each_token(config):
    cache = KVCache(config, 3, 50, dtype=torch.bfloat16)
    (rows,), (others,) = cache.blocks
    width = config.latent_attention.kv_lora_rank + 4
    assert rows.shape == others.shape == (3, 1, 50, width)
    assert 2 * rows.nbytes == kv_cache_bytes(config, 3, 50) == 2 * 3 * 50 * width * 2


def test_a_new_token_never_expands_what_is_cached(config):
    layer = build(config).layers[0].attn
    expanded = []
    layer.kv_up.register_forward_pre_hook(lambda _, args: expanded.append(args[0].shape[1]))
    cache = KVCache(config, 1, 40)

    def step(length):
        tables = rope_tables(config, torch.arange(cache.length, cache.length + length), 40)
        seen = torch.ones(length, cache.length + length).tril(cache.length).bool()
        mask = None if length == 1 or cache.length == 0 else seen[None, None]
        layer(torch.randn(1, length, 32), *tables, mask, cache.behind(length)[0])
        cache.length += length

    with torch.no_grad():
        step(10)
        step(1)
        step(3)
        step(1)
        assert expanded == [10]
        step(20)
    always = config.latent_attention.kv_lora_rank == 6
    assert expanded == ([10] if always else [10, 35])


class Adapted(torch.nn.Module):
    """A linear layer with low-rank matrices besides, and its weight as LoRA layers show it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False, dtype=torch.float64)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False, dtype=torch.float64)

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def test_adapters_of_the_expanding_matrix_count_in_steps_too(config):
    model = build(config, torch.float64)
    plain = model(tokens())
    for block in model.layers:
        block.attn.kv_up = Adapted(block.attn.kv_up)
    with torch.no_grad():
        expected = model(tokens())
        cache = KVCache(config, 2, 40, dtype=torch.float64)
        parts = [model(part, cache=cache) for part in tokens().split([20, 1, 3, 1, 15], dim=1)]
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_layers_with_kernels_are_absorbed_like_others():
    attn = build(NARROW).layers[0].attn
    assert attn._absorbs(1)
    attn.kv_up.__class__ = FewRowsLinear
    assert attn._absorbs(1)


def test_what_a_conversation_rereads_and_how_its_cache_grows():
    model = build(NARROW)
    ids = tokens(30, 1)[0].tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    context = Context(model)
    context.read([*ids[:5], 7, 7])
    torch.testing.assert_close(context.read(ids[:8])[0], expected[7])
    for position in range(8, 30):
        logits = context.add(torch.tensor(ids[position : position + 1]), ids[position])
        torch.testing.assert_close(logits[0], expected[position], atol=1e-5, rtol=1e-5)


def test_packed_documents_are_the_documents_apart(config):
    model = build(config)
    first, second = tokens(16, 1).split([7, 9], dim=1)
    numbers = torch.tensor([[0] * 7 + [1] * 9])
    with torch.no_grad():
        packed = model(torch.cat((first, second), 1), documents=numbers)
        apart = torch.cat((model(first), model(second)), 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["true", "autocast"])
def test_bf16_follows_fp32(config, mode):
    model = Decoder(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        exact = model(tokens())
        if mode == "true":
            model = model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            whole = model(tokens())
            cache = KVCache(config, 2, 40, dtype=torch.bfloat16)
            steps = [model(part, cache=cache) for part in tokens().split([20, 1, 3, 1, 15], 1)]
    assert (whole.float() - exact).abs().max() > 0
    for found in (whole, torch.cat(steps, 1)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.1)


def test_training_reaches_every_parameter(config):
    model = build(config).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(), tokens().roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_it_builds_without_memory(config):
    with torch.device("meta"):
        model = Decoder(config)
        out = model(torch.zeros(2, 12, dtype=torch.int64))
    assert out.shape == (2, 12, 64)
    assert next(model.parameters()).is_meta


def test_norms_of_the_small_vectors_have_their_own_epsilon():
    layer = LatentAttention(replace(NARROW, norm_eps=1e-3))
    assert (layer.q_norm.eps, layer.kv_norm.eps) == (1e-6, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["narrow", "direct"])
def test_compiled_is_eager(name):
    model, compiled = build(CONFIGS[name]).train(), build(CONFIGS[name]).train()
    for block in compiled.layers:
        block.compile()
    for each in (model, compiled):
        (each(tokens(), tokens().roll(-1, 1)) / tokens().numel()).backward()
    for (what, expected), found in zip(model.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=what)
    model.eval(), compiled.eval()
    cache = KVCache(CONFIGS[name], 2, 40)
    with torch.no_grad():
        parts = [compiled(part, cache=cache) for part in tokens().split([20, 1, 1, 1, 16, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens()), atol=1e-4, rtol=1e-4)

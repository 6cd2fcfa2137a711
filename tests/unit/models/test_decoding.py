import pytest
import torch

from gristmill.config.model import LatentAttention, MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, generate_tokens
from gristmill.models.init import init_weights
from gristmill.util.errors import UserError

SHAPES = {
    "grouped": {"num_kv_heads": 2, "tie_embeddings": True},
    "parallel": {
        "family": "pythia",
        "norm": "layernorm",
        "mlp": "plain",
        "activation": "gelu",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "parallel_residual": True,
        "rope_fraction": 0.25,
        "num_token_ids": 59,
    },
    "windows": {
        "num_layers": 3,
        "sliding_window": 5,
        "sliding_pattern": (True, False),
        "rope_local_theta": 500.0,
        "attention_softcap": 20.0,
    },
    "latent": {
        "latent_attention": LatentAttention(
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
    },
    "experts": {
        "moe": MixtureOfExperts(num_experts=4, intermediate_size=16, num_dense_layers=1),
    },
    "learned": {"positions": "learned", "norm": "layernorm", "qk_norm": "head"},
}
BY_LENGTH = {
    "dynamic": RopeScaling(kind="dynamic", factor=4.0, original_max_seq_length=8),
    "longrope": RopeScaling(
        kind="longrope",
        factor=4.0,
        original_max_seq_length=8,
        short_factors=(1.0, 1.0, 1.0, 1.0),
        long_factors=(1.0, 2.0, 3.0, 4.0),
    ),
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def tiny(shape="grouped", context=64, scale=4.0):
    """A random model of a kind in `SHAPES`, or of a shape of one's own."""
    fields = SHAPES[shape] if isinstance(shape, str) else shape
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        max_seq_length=context,
        **{"num_layers": 2, **fields},
    )
    model = Decoder(config)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)  # far enough from uniform that no two logits tie
    return model.eval()


@torch.no_grad()
def greedy(model, prompt, count):
    """The slow way: the whole sequence through the model for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_is_the_full_forward(shape):
    model = tiny(shape)
    stream = generate_tokens(model, PROMPT, max_new_tokens=30, temperature=0)
    expected = greedy(model, PROMPT, 30)
    assert len(set(expected)) > 3
    assert list(stream) == expected
    assert stream.stop == "max_new_tokens"
    assert stream.num_tokens == 30


def test_it_streams():
    calls = []
    model = tiny()
    model.register_forward_hook(lambda *_: calls.append(1))
    stream = generate_tokens(model, PROMPT, max_new_tokens=30, temperature=0)
    assert calls == []
    next(stream)
    assert len(calls) == 1
    next(stream)
    assert len(calls) == 2
    assert not torch.is_inference_mode_enabled()


def test_eos_ends_and_is_left_out():
    model = tiny()
    ids = greedy(model, PROMPT, 30)
    end = ids[5]
    stream = generate_tokens(model, PROMPT, max_new_tokens=30, temperature=0, eos_ids={end})
    assert list(stream) == ids[: ids.index(end)]
    assert stream.stop == "eos"
    assert next(stream, None) is None


def test_full_context_ends():
    model = tiny(context=16)
    stream = generate_tokens(model, PROMPT, max_new_tokens=30, temperature=0)
    assert len(list(stream)) == 16 - len(PROMPT)
    assert stream.stop == "context"
    exact = generate_tokens(model, PROMPT, max_new_tokens=8, temperature=0)
    assert len(list(exact)) == 8
    assert exact.stop == "max_new_tokens"


def test_same_seed_same_ids():
    model = tiny(scale=1.0)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(generate_tokens(model, PROMPT, max_new_tokens=20, generator=generator))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        (list(range(16)), {}, r"16 tokens of 16.*at most 15"),
        (PROMPT, {"max_new_tokens": 0}, r"max_new_tokens 0"),
        (PROMPT, {"temperature": -0.5}, r"temperature must be 0 or more \(-0.5\)"),
        (PROMPT, {"temperature": float("nan")}, "temperature must be"),
        (PROMPT, {"top_k": 0}, r"top_k must be 1 or more \(0\)"),
        (PROMPT, {"top_p": -0.1}, r"top_p must be from 0 to 1"),
        (PROMPT, {"top_p": 1.5}, r"from 0 to 1 \(1.5\)"),
    ],
)
def test_wrong_uses_are_refused_at_once(prompt, options, message):
    with pytest.raises(UserError, match=message):
        generate_tokens(tiny(context=16), prompt, **{"max_new_tokens": 4, **options})


def test_longer_sequence_computes_only_what_is_new():
    model = tiny()
    lengths = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    context = Context(model)
    first = context.read(PROMPT)
    extended = [*PROMPT, 7, 8, 9]
    logits = context.read(extended)
    assert lengths == [len(PROMPT), 3]
    torch.testing.assert_close(logits, Context(model).read(extended))
    again = context.read(PROMPT)
    assert lengths[-1] == 1
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("shape", SHAPES)
def test_another_continuation_replaces_what_was_held(shape):
    model = tiny(shape)
    context = Context(model)
    context.read([*PROMPT, 7, 8, 9])
    other = [*PROMPT[:4], 20, 21, 22, 23, 24, 25, 26, 27]
    torch.testing.assert_close(context.read(other), Context(model).read(other))
    assert context.ids == other


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_keys_turned_for_another_length_are_not_used_again(kind, monkeypatch):
    monkeypatch.setitem(SHAPES, kind, {"rope_scaling": BY_LENGTH[kind]})
    model = tiny(kind)
    context = Context(model)
    context.read(PROMPT)
    longer = [*PROMPT, 7, 8, 9, 10]
    for ids in (longer, PROMPT):
        torch.testing.assert_close(context.read(ids), model(torch.tensor([ids]))[:, -1])
        assert context.ids == ids


@pytest.mark.parametrize("shape", SHAPES)
def test_growing_keeps_what_was_read(shape):
    model = tiny(shape)
    context = Context(model)
    context.read(PROMPT)
    for token in range(30):
        logits = context.add(torch.tensor([token]), token)
    torch.testing.assert_close(logits, Context(model).read([*PROMPT, *range(30)]))


def test_an_interrupted_step_leaves_the_context_usable():
    model = tiny()
    context = Context(model)
    context.read(PROMPT)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        context.add(torch.tensor([5]), 5)
    handle.remove()
    assert context.ids == PROMPT
    logits = context.add(torch.tensor([6]), 6)
    torch.testing.assert_close(logits, Context(model).read([*PROMPT, 6]))


def test_bf16_follows_fp32():
    model = tiny(scale=1.0)
    exact = Context(model).read(PROMPT)
    mixed = Context(model, autocast=torch.bfloat16).read(PROMPT)
    assert (mixed - exact).abs().max() > 0
    torch.testing.assert_close(mixed.float(), exact, atol=0.02, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["grouped", "windows", "latent"])
def test_compiled_is_eager(shape, monkeypatch):
    monkeypatch.setattr("gristmill.models.cache.PREFILL_TOKENS", 8)
    monkeypatch.setattr("gristmill.models.cache.MARGIN", 3)
    model = tiny(shape)
    expected = greedy(model, PROMPT, 30)
    context = Context(model)
    reason = context.compile()
    if reason is not None:
        pytest.skip(f"no compiler here: {reason}")
    assert list(generate_tokens(context, PROMPT, max_new_tokens=30, temperature=0)) == expected


def test_a_failing_compiler_leaves_the_model_as_it_was(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_args, **_kwargs):
        raise TorchDynamoException("no working C++ compiler\nmore")

    model = tiny()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail)
    )
    context = Context(model)
    assert context.compile() == "no working C++ compiler"
    assert list(generate_tokens(context, PROMPT, max_new_tokens=5, temperature=0)) == greedy(
        model, PROMPT, 5
    )

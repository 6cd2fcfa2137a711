import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.unit.models.test_decoding import PROMPT, tiny

from gristmill.config.model import AdaptionPrompt, ModelConfig
from gristmill.models import kernels
from gristmill.models.batching import Batch
from gristmill.models.cache import KVCache
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context
from gristmill.models.init import init_weights


@pytest.fixture
def short_buffers(monkeypatch):
    """Buffers of sliding windows are full, and their positions move, after some tokens."""
    monkeypatch.setattr("gristmill.models.cache.PREFILL_TOKENS", 4)
    monkeypatch.setattr("gristmill.models.cache.MARGIN", 3)


@pytest.fixture(scope="module")
def kernel():
    if reason := kernels.build():
        pytest.skip(reason)


def close(got, expected):
    assert got.dtype is torch.bfloat16
    scale = expected.abs().max()
    torch.testing.assert_close(got.float() / scale, expected / scale, atol=1e-2, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(("out", "inner"), [(64, 32), (50, 96), (577, 1536)])
@torch.inference_mode()
def test_products_are_those_of_torch(kernel, rows, out, inner):
    x, weight = torch.randn(rows, inner).bfloat16(), torch.randn(out, inner).bfloat16()
    bias = torch.randn(out).bfloat16()
    close(kernels.linear(x, weight), x.float() @ weight.float().T)
    close(kernels.linear(x[:, None], weight, bias)[:, 0], F.linear(*map(_f, (x, weight, bias))))
    whole, scale = torch.randint(-128, 128, (out, inner), dtype=torch.int8), torch.rand(out)
    layer = kernels.Int8Linear(whole, scale.bfloat16(), bias)
    close(layer(x), x.float() @ (whole.T * scale.bfloat16().float()) + bias.float())


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_products_together_are_those_apart(kernel, int8):
    def layer(out):
        own = torch.nn.Linear(96, out).bfloat16()
        own.__class__ = kernels.FewRowsLinear
        if not int8:
            return own
        whole = torch.randint(-127, 128, (out, 96), dtype=torch.int8)
        return kernels.Int8Linear(whole, torch.rand(out).bfloat16() / 99, own.bias)

    x = torch.randn(3, 1, 96).bfloat16()
    layers = [layer(out) for out in (64, 50, 32)]
    for got, one in zip(kernels.project(x, *layers), layers, strict=True):
        assert torch.equal(got, one(x))
    gate, up = layer(50), layer(50)
    close(kernels.gated(x, gate, up), F.silu(gate(x).float()) * up(x).float())


def _f(tensor):
    return tensor.float()


@pytest.mark.parametrize("shape", [(31, 32), (64, 40), (64, 31)])
def test_other_shapes_and_gradients_are_left_to_torch(kernel, shape, monkeypatch):
    monkeypatch.setattr(kernels, "_product", None)
    weight = torch.randn(shape).bfloat16()
    x = torch.randn(2, shape[1]).bfloat16()
    with torch.inference_mode():
        assert torch.equal(kernels.linear(x, weight), F.linear(x, weight))
    square = torch.randn(32, 32).bfloat16().requires_grad_()
    kernels.linear(torch.randn(2, 32).bfloat16(), square).sum().backward()
    assert square.grad is not None


@torch.inference_mode()
def test_a_model_uses_it_and_says_the_same(kernel):
    plain, fast = (tiny("parallel", scale=1.0).bfloat16() for _ in range(2))
    assert kernels.use_kernels(fast) is None
    assert fast.state_dict().keys() == plain.state_dict().keys()
    calls = []
    inner = kernels._product
    kernels._product = lambda *args: calls.append(1) or inner(*args)
    try:
        got = fast(torch.tensor([PROMPT]))
    finally:
        kernels._product = inner
    assert len(calls) == 2 * 3 + 1  # o, up and down of each block, and the head
    expected = tiny("parallel", scale=1.0)(torch.tensor([PROMPT]))
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.1)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 9), (2, 4)])
@torch.inference_mode()
def test_more_than_a_cache_has_room_for_is_refused(kernel, rows, tokens):
    fast = fast_and_exact("grouped")[0]
    cache = KVCache(fast.config, 1, 8, dtype=torch.bfloat16)
    with pytest.raises((AssertionError, RuntimeError), match="no room|must match|expanded"):
        fast(torch.ones(rows, tokens, dtype=torch.int64), cache=cache)


def test_models_in_fp32_are_left_alone():
    assert kernels.use_kernels(tiny()) == "they are for bf16 on a CPU"


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_state", {})
    monkeypatch.setattr(kernels, "user_cache_dir", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    kernels._compiler.cache_clear()
    assert "AMX" in (reason := kernels.build()) or "no C++ compiler" in reason
    kernels._compiler.cache_clear()
    assert not kernels.is_built()


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A cache directory without kernels, where building takes no time; and its libraries."""

    def compile_(command, **_):
        Path(command[command.index("-o") + 1]).write_bytes(b"built here")

    monkeypatch.setattr(kernels, "user_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(kernels, "_compiler", lambda: sys.executable)
    monkeypatch.setattr(kernels.subprocess, "run", compile_)
    monkeypatch.setattr(kernels.platform, "system", lambda: "Linux")
    monkeypatch.setattr(kernels.torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(kernels.torch.cpu, "_init_amx", lambda: True)
    return tmp_path / "kernels"


def test_a_library_is_built_once_whatever_the_umask(cached):
    told = []
    old = os.umask(0o002)
    try:
        built = kernels._library(told.append)
    finally:
        os.umask(old)
    assert built == kernels._library(told.append)
    assert len(told) == 1
    assert list(cached.iterdir()) == [built]


def test_a_compiler_that_fails_is_not_asked_again(cached, monkeypatch, tmp_path):
    compiler, asked, told = tmp_path / "g++", [], []
    compiler.write_text("old")
    works = kernels.subprocess.run

    def fail(command, **_):
        asked.append(command)
        stderr = "In file included from x\nx:1: error: no such header\n"
        raise subprocess.CalledProcessError(1, command, stderr=stderr)

    monkeypatch.setattr(kernels, "_compiler", lambda: str(compiler))
    monkeypatch.setattr(kernels.subprocess, "run", fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="could not build them: x:1: error: no such header"):
            kernels._library(told.append)
    assert len(asked) == 1
    assert len(told) == 2
    assert "Going on without" in told[1]
    compiler.write_text("a newer one")
    monkeypatch.setattr(kernels.subprocess, "run", works)
    built = kernels._library(told.append)
    assert list(cached.iterdir()) == [built]


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_is_built_anew(cached, mode):
    built = kernels._library(None)
    built.write_bytes(b"something else")
    built.chmod(mode)
    assert kernels._library(None) == built
    assert built.read_bytes() == b"built here"
    built.write_bytes(b"something else")
    cached.chmod(mode)
    private = kernels._library(None)
    assert private.parent != cached
    assert private.parent.stat().st_mode & 0o777 == 0o700
    assert private.read_bytes() == b"built here"


def test_a_library_of_another_user_is_not_loaded(cached, monkeypatch):
    built = kernels._library(None)
    other = os.geteuid() + 1
    monkeypatch.setattr(kernels.os, "geteuid", lambda: other)
    assert kernels._library(None).parent != built.parent


def test_a_private_folder_is_removed_at_exit(tmp_path):
    (tmp_path / "file").touch()
    code = "from gristmill.models import kernels; print(kernels._folder())"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.startswith(str(tmp_path)), run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_torch_without_what_is_asked_goes_without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_state", {})
    monkeypatch.delattr(kernels.torch.cpu, "get_capabilities")
    assert "get_capabilities" in kernels.build()


@torch.inference_mode()
def test_parts_of_something_wider(kernel):
    wide = torch.randn(3, 1, 96).bfloat16()
    part, weight = wide[..., 16:80], torch.randn(50, 64).bfloat16()
    assert torch.equal(kernels.linear(part, weight), kernels.linear(part.clone(), weight))
    norm = torch.nn.RMSNorm(64).bfloat16()
    norm.__class__ = kernels.OnePassNorm
    close(norm(part), F.rms_norm(part.float(), (64,)))


@torch.inference_mode()
def test_no_rows_are_no_products(kernel):
    empty = torch.empty(0, 64, dtype=torch.bfloat16)
    layer, norm = torch.nn.Linear(64, 50).bfloat16(), torch.nn.RMSNorm(64).bfloat16()
    layer.__class__, norm.__class__ = kernels.FewRowsLinear, kernels.OnePassNorm
    whole = torch.ones(50, 64, dtype=torch.int8)
    int8 = kernels.Int8Linear(whole, torch.ones(50).bfloat16(), None)
    assert norm(empty).shape == (0, 64)
    for out in (layer(empty), int8(empty), *kernels.project(empty, layer, layer, int8)):
        assert out.shape == (0, 50)
    assert kernels.gated(empty, layer, layer).shape == (0, 50)


ATTENTION = {
    "grouped": {"num_kv_heads": 2},
    "one group": {"num_kv_heads": 1, "head_dim": 64},
    "many heads": {"num_heads": 40, "num_kv_heads": 2, "head_dim": 96},
    "part": {"rope_fraction": 0.25, "qk_norm": "head"},
    "window": {"sliding_window": 5, "num_kv_heads": 2},
    "capped": {"attention_softcap": 2.0, "num_kv_heads": 2},
    "learned": {"positions": "learned", "norm": "layernorm"},
}


def fast_and_exact(name):
    """A model in bf16 with the kernels, and the same in fp32."""
    options = {"num_heads": 4, **ATTENTION[name]}
    config = ModelConfig(
        vocab_size=64,
        num_layers=2,
        hidden_size=128,
        intermediate_size=96,
        max_seq_length=64,
        **options,
    )
    fast = Decoder(config)
    init_weights(fast, seed=1)
    fast = fast.bfloat16().eval()
    exact = copy.deepcopy(fast).float()
    assert kernels.use_kernels(fast) is None
    return fast, exact


@pytest.mark.parametrize("name", ATTENTION)
@torch.inference_mode()
def test_prompts_are_read_as_in_the_full_forward(kernel, name):
    fast, exact = fast_and_exact(name)
    batch, context = Batch(fast, 4, 60), Context(fast)
    texts = [[(7 * i + row) % 64 for i in range(30 - row)] for row in range(3)]
    held = batch.put_all([1, 2, 3], texts)
    for got, ids in zip(held, texts, strict=True):
        expected = exact(torch.tensor([ids]))[:, -1]
        torch.testing.assert_close(got[None].float(), expected, atol=0.02, rtol=0.1)
        # In two parts, of which the second continues the first.
        context.read(ids[:20])
        torch.testing.assert_close(context.read(ids).float(), expected, atol=0.02, rtol=0.1)


@torch.inference_mode()
def test_a_step_computes_the_rows_it_is_for(kernel):
    fast, _ = fast_and_exact("grouped")
    counts = []
    fast.layers[0].register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    batch = Batch(fast, 30, 60)
    for row in (2, 20, 29):
        batch.put(row, [*PROMPT])
    counts.clear()
    apart = [[block[0][row].clone() for block in batch._cache.blocks] for row in (3, 20)]
    first, second = batch.step([29, 2], [5, 5])
    assert counts == [2]
    torch.testing.assert_close(first, second)
    for row, before in zip((3, 20), apart, strict=True):
        for block, held in zip(batch._cache.blocks, before, strict=True):
            assert torch.equal(block[0][row], held)


@pytest.mark.parametrize("name", ATTENTION)
@torch.inference_mode()
def test_rows_attend_as_in_the_full_forward(kernel, name, short_buffers):
    fast, exact = fast_and_exact(name)
    if name in ("grouped", "one group", "window", "capped"):
        assert all(block.is_plain for block in fast.layers)
    batch = Batch(fast, 3, 60)
    texts = {0: [*PROMPT], 1: [5], 2: [*PROMPT, *PROMPT, *PROMPT]}
    for row, ids in texts.items():
        batch.put(row, ids)
    for token in range(20):
        rows = [2, 0] if token % 3 == 0 else [0, 1, 2]
        got = batch.step(rows, [token + row for row in rows])
        for row, logits in zip(rows, got, strict=True):
            texts[row].append(token + row)
            expected = exact(torch.tensor([texts[row]]))[0, -1]
            torch.testing.assert_close(logits.float(), expected, atol=0.02, rtol=0.1)


@torch.inference_mode()
def test_trained_vectors_are_looked_at_in_steps_too(kernel):
    prompt = AdaptionPrompt(length=3, num_layers=1)
    config = ModelConfig(
        vocab_size=64,
        num_layers=2,
        num_heads=4,
        hidden_size=128,
        intermediate_size=96,
        max_seq_length=64,
        adaption_prompt=prompt,
    )
    fast = Decoder(config)
    init_weights(fast, seed=1)
    fast.layers[1].attn.prompt.vectors.normal_(generator=torch.Generator().manual_seed(2))
    fast.layers[1].attn.prompt.gate.fill_(20)
    fast = fast.bfloat16().eval()
    exact = copy.deepcopy(fast).float()
    assert kernels.use_kernels(fast) is None
    batch, context = Batch(fast, 1, 60), Context(fast)
    ids = [*PROMPT]
    batch.put(0, ids), context.read(ids)
    for token in range(5):
        ids.append(token)
        expected = exact(torch.tensor([ids]))[:, -1]
        for got in (batch.step([0], [token]), context.add(torch.tensor([token]), token)):
            torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.1)

import pytest
import torch
import torch.nn.functional as F
from tests.unit.models.test_decoding import PROMPT, tiny

from gristmill.models import few_rows


@pytest.fixture(scope="module")
def kernel():
    if reason := few_rows.build():
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
    close(few_rows.linear(x, weight), x.float() @ weight.float().T)
    close(few_rows.linear(x[:, None], weight, bias)[:, 0], F.linear(*map(_f, (x, weight, bias))))
    whole, scale = torch.randint(-127, 128, (out, inner), dtype=torch.int8), torch.rand(out)
    layer = few_rows.Int8Linear(whole, scale.bfloat16(), bias)
    close(layer(x), x.float() @ (whole.T * scale.bfloat16().float()) + bias.float())


def _f(tensor):
    return tensor.float()


@pytest.mark.parametrize("shape", [(31, 32), (64, 40), (64, 31)])
def test_other_shapes_and_gradients_are_left_to_torch(kernel, shape, monkeypatch):
    monkeypatch.setattr(few_rows, "_product", None)
    weight = torch.randn(shape).bfloat16()
    x = torch.randn(2, shape[1]).bfloat16()
    with torch.inference_mode():
        assert torch.equal(few_rows.linear(x, weight), F.linear(x, weight))
    square = torch.randn(32, 32).bfloat16().requires_grad_()
    few_rows.linear(torch.randn(2, 32).bfloat16(), square).sum().backward()
    assert square.grad is not None


@torch.inference_mode()
def test_a_model_uses_it_and_says_the_same(kernel):
    plain, fast = (tiny("parallel", scale=1.0).bfloat16() for _ in range(2))
    assert few_rows.use_few_rows(fast) is None
    assert fast.state_dict().keys() == plain.state_dict().keys()
    calls = []
    inner = few_rows._product
    few_rows._product = lambda *args: calls.append(1) or inner(*args)
    try:
        got = fast(torch.tensor([PROMPT]))
    finally:
        few_rows._product = inner
    assert len(calls) == 2 * 6 + 1
    expected = tiny("parallel", scale=1.0)(torch.tensor([PROMPT]))
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.1)


def test_models_in_fp32_are_left_alone():
    assert few_rows.use_few_rows(tiny()) == "it is for bf16 on a CPU"


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(few_rows, "_state", {})
    monkeypatch.setattr(few_rows, "user_cache_dir", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    few_rows._compiler.cache_clear()
    assert "AMX" in (reason := few_rows.build()) or "no C++ compiler" in reason
    few_rows._compiler.cache_clear()
    assert not few_rows.is_built()

import math

import pytest
import torch
import torch.nn.functional as F

from gristmill.models.attention import _CausalAttention, attend


def reference(q, k, v, allowed):
    """Attention written out, with the keys and values repeated for the heads that share them."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 7])
def test_groups_share_keys_and_values_in_order(kv_heads, length):
    torch.manual_seed(0)
    q = torch.randn(2, 6, length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 7, 8, dtype=torch.float64)
    causal = torch.ones(length, 7, dtype=torch.bool).tril(7 - length)
    torch.testing.assert_close(attend(q, k, v), reference(q, k, v, causal))


def test_mask_replaces_the_causal_rule():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 5) > 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, mask), reference(q, k, v, mask))


def test_flash_kernel_is_used_on_cpu():
    q, k = torch.randn(1, 4, 16, 8, requires_grad=True), torch.randn(1, 2, 16, 8)
    out = attend(q, k, k)
    assert "Flash" in type(out.grad_fn).__name__, type(out.grad_fn).__name__


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [2, 255, 256, 600])
def test_the_written_out_backward_pass_is_that_of_the_kernel(heads, kv_heads, length):
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (
        torch.randn(2, n, length, 8, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    written = [x.clone().requires_grad_() for x in (q, k, v)]
    kernel = [x.clone().requires_grad_() for x in (q, k, v)]
    _CausalAttention.apply(*written, None, 8**-0.5).backward(grad)
    grouped = heads != kv_heads
    F.scaled_dot_product_attention(*kernel, is_causal=True, enable_gqa=grouped).backward(grad)
    for mine, theirs in zip(written, kernel, strict=True):
        # Weights are made in fp32, whatever the inputs are.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 8])
def test_the_written_out_backward_pass_is_right_for_large_scores_in_bf16(size):
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 4, 300, 64)
    inputs = [(x * factor).bfloat16() for x, factor in ((q, size), (k, size), (v, 1))]
    written = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    _CausalAttention.apply(*written, None, 64**-0.5).backward(grad.bfloat16())
    F.scaled_dot_product_attention(*exact, is_causal=True).backward(grad.bfloat16().double())
    for mine, theirs in zip(written, exact, strict=True):
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.02

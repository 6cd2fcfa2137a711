"""The head's loss against torch's own cross entropy of the full logits."""

import pytest
import torch
import torch.nn.functional as F

from gristmill.models import loss as loss_module
from gristmill.models.loss import linear_cross_entropy

ROWS, WIDTH, VOCAB = 75, 16, 130


def make(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=draw, dtype=dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    targets[::7] = -100
    return hidden, weight, targets


def reference(hidden, weight, targets, z_loss=0.0):
    """Loss of full logits, as one would write it without caring for memory."""
    logits = hidden @ weight.t()
    normaliser = logits.logsumexp(-1)[targets != -100]
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * normaliser.square().sum()


def gradients(loss, hidden, weight, scale=1.0):
    return torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.fixture(params=[8, 75, 512], ids=["many chunks", "exact chunk", "one chunk"])
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_CHUNK_ROWS", request.param)
    monkeypatch.setattr(loss_module, "EAGER_ROWS", 5)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_gradients_equal_full_logits(dtype, tolerance, z_loss):
    hidden, weight, targets = make(dtype)
    ours = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    theirs = reference(hidden, weight, targets, z_loss)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert ours.dtype == dtype
    assert ours.shape == ()
    for got, want in zip(
        gradients(ours, hidden, weight, 0.3), gradients(theirs, hidden, weight, 0.3)
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def with_bias_and_cap(hidden, weight, bias, targets, softcap=None, z_loss=0.0, ids=VOCAB):
    """The same with everything a head may have."""
    logits = hidden @ weight[:ids].t()
    if bias is not None:
        logits = logits + bias[:ids]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    normaliser = logits.logsumexp(-1)[targets != -100]
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * normaliser.square().sum()


def make_with_bias(dtype=torch.float32):
    hidden, weight, targets = make(dtype)
    draw = torch.Generator().manual_seed(1)
    return hidden, weight, torch.randn(VOCAB, generator=draw, dtype=dtype).requires_grad_(), targets


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_bias_and_softcap_equal_the_plain_formula(dtype, tolerance, biased, softcap, z_loss):
    hidden, weight, bias, targets = make_with_bias(dtype)
    bias = bias if biased else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    ours = linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap, z_loss=z_loss)
    theirs = with_bias_and_cap(hidden, weight, bias, targets, softcap, z_loss)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    got, want = (torch.autograd.grad(loss * 0.3, inputs) for loss in (ours, theirs))
    for mine, plain in zip(got, want):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bias_of_rows_that_are_no_token_gets_no_gradient(softcap):
    hidden, weight, bias, targets = make_with_bias()
    ids, inputs = 100, (hidden, weight, bias)
    targets = targets.clamp(max=ids - 1)
    ours = linear_cross_entropy(
        hidden, weight, targets, bias=bias, softcap=softcap, num_token_ids=ids
    )
    theirs = with_bias_and_cap(hidden, weight, bias, targets, softcap, ids=ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    assert not got[1][ids:].any()
    assert not got[2][ids:].any()
    for mine, plain in zip(got, want):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low_parameters", [False, True])
def test_bf16_bias_and_softcap_are_close(low_parameters):
    """Under autocast, and with parameters that are bf16 themselves."""
    *inputs, targets = make_with_bias()
    want = with_bias_and_cap(*inputs, targets, 5.0, 1e-3)
    mine = [x.detach().bfloat16().requires_grad_() for x in inputs] if low_parameters else inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=not low_parameters):
        ours = linear_cross_entropy(*mine[:2], targets, bias=mine[2], softcap=5.0, z_loss=1e-3)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, want, rtol=5e-3, atol=0.0)
    pairs = zip(torch.autograd.grad(ours, mine), torch.autograd.grad(want, inputs), mine)
    for got, plain, parameter in pairs:
        assert got.dtype == parameter.dtype
        assert (got.float() - plain).norm() <= 2e-2 * plain.norm()


def test_only_the_gradient_of_the_bias():
    hidden, weight, bias, targets = make_with_bias()
    ours = linear_cross_entropy(hidden.detach(), weight.detach(), targets, bias=bias, softcap=3.0)
    (got,) = torch.autograd.grad(ours, bias)
    (want,) = torch.autograd.grad(with_bias_and_cap(hidden, weight, bias, targets, 3.0), bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_target_that_is_no_token_is_infinitely_wrong(softcap):
    hidden, weight, targets = make()
    ours = linear_cross_entropy(hidden, weight, targets, softcap=softcap, num_token_ids=100)
    assert ours.item() == torch.inf


def test_capped_logits_of_any_size_stay_finite():
    hidden, weight, bias, targets = make_with_bias()
    with torch.no_grad():
        hidden *= 1e6
    ours = linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=30.0)
    torch.testing.assert_close(ours, with_bias_and_cap(hidden, weight, bias, targets, 30.0))
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours, (hidden, weight, bias)))


@pytest.mark.usefixtures("chunk_rows")
def test_autocast_products_are_bf16_and_gradients_close():
    hidden, weight, targets = make()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
    theirs = reference(hidden, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=3e-3, atol=0.0)
    assert ours.item() != theirs.item()  # else nothing ran in bf16
    for got, want in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight)):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_bf16_parameters_get_bf16_gradients():
    hidden, weight, targets = make()
    theirs = reference(hidden, weight, targets)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    ours = linear_cross_entropy(*low, targets)
    assert ours.dtype == torch.float32
    for got, want in zip(gradients(ours, *low), gradients(theirs, hidden, weight)):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= 2e-2 * want.norm()


def test_bf16_error_is_that_of_bf16_cross_entropy():
    """Confident predictions, where a careless one-hot subtraction loses all digits."""
    hidden, weight, targets = make()
    targets = (hidden @ weight.t()).argmax(-1)
    theirs = gradients(reference(hidden * 3, weight, targets), hidden, weight)
    low = [(hidden.detach() * 3).bfloat16().requires_grad_(), weight.detach().bfloat16()]
    plain = F.cross_entropy((low[0] @ low[1].t()).float(), targets, reduction="sum")
    (plain_grad,) = torch.autograd.grad(plain, low[0])
    (ours_grad,) = torch.autograd.grad(linear_cross_entropy(*low, targets), low[0])
    error = (ours_grad.float() * 3 - theirs[0]).norm()
    assert error <= 1.2 * (plain_grad.float() * 3 - theirs[0]).norm()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(wanted):
    hidden, weight, targets = make()
    expected = gradients(reference(hidden, weight, targets), hidden, weight)
    inputs = [x.detach().requires_grad_(want) for x, want in zip((hidden, weight), wanted)]
    linear_cross_entropy(*inputs, targets).backward()
    for x, want, value in zip(inputs, wanted, expected):
        if want:
            torch.testing.assert_close(x.grad, value, rtol=1e-5, atol=1e-5)
        else:
            assert x.grad is None


def test_without_gradients_nothing_but_the_loss_is_made(monkeypatch):
    hidden, weight, targets = make()
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, targets)
    assert not plain.requires_grad
    assert plain.item() == linear_cross_entropy(hidden, weight, targets).item()


def test_tied_embedding_sums_both_gradients():
    _, weight, targets = make()
    tokens = torch.arange(ROWS) % VOCAB
    ours = linear_cross_entropy(F.embedding(tokens, weight), weight, targets)
    theirs = reference(F.embedding(tokens, weight), weight, targets)
    got, want = (torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_token_take_no_part():
    hidden, weight, targets = make()
    ids = 100
    targets = targets.clamp(max=ids - 1)
    ours = linear_cross_entropy(hidden, weight, targets, num_token_ids=ids)
    theirs = reference(hidden, weight[:ids], targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    got, want = gradients(ours, hidden, weight), gradients(theirs, hidden, weight)
    assert not got[1][ids:].any()
    for mine, plain in zip(got, want):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_all_positions_ignored_is_zero_with_zero_gradients():
    hidden, weight, targets = make()
    ours = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), z_loss=0.1)
    assert ours.item() == 0.0
    assert not any(g.any() for g in gradients(ours, hidden, weight))


def test_no_positions_is_zero():
    _, weight, _ = make()
    hidden = torch.empty(0, WIDTH, requires_grad=True)
    ours = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64))
    assert ours.item() == 0.0
    assert not gradients(ours, hidden, weight)[1].any()


def test_large_logits_stay_finite():
    hidden, weight, targets = make()
    with torch.no_grad():
        hidden *= 1e3
    ours = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(ours, reference(hidden, weight, targets))
    assert all(g.isfinite().all() for g in gradients(ours, hidden, weight))


def test_a_broken_activation_shows_in_the_loss():
    hidden, weight, targets = make()
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    assert not linear_cross_entropy(hidden, weight, targets).isfinite()


def test_repeatable_bitwise():
    hidden, weight, targets = make()
    with torch.autocast("cpu", torch.bfloat16):
        runs = [linear_cross_entropy(hidden, weight, targets) for _ in range(2)]
    first, second = ((run, *gradients(run, hidden, weight)) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_backward_is_refused():
    hidden, weight, targets = make()
    ours = linear_cross_entropy(hidden, weight, targets)
    ours.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        ours.backward()


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(monkeypatch, dtype, softcap):
    monkeypatch.setattr(loss_module, "CPU_CHUNK_ROWS", 32)
    *parameters, targets = (x.detach() for x in make_with_bias())
    options = {"softcap": softcap, "z_loss": 1e-3, "num_token_ids": 120}
    results = []
    for compiled in (False, True):
        inputs = [x.clone().to(dtype).requires_grad_() for x in parameters]
        ours = linear_cross_entropy(
            *inputs[:2],
            targets.clamp(max=119),
            bias=inputs[2] if softcap else None,
            compiled=compiled,
            **options,
        )
        wanted = inputs if softcap else inputs[:2]
        results.append((ours, *torch.autograd.grad(ours, wanted)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for eager, fused in zip(*results):
        torch.testing.assert_close(fused, eager, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_two_factors_are_the_head_that_they_come_to(softcap):
    """An adapter of the head: the same loss and gradients as of the whole sum."""
    torch.manual_seed(0)
    hidden = torch.randn(70, 16, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(40, 16).double(), torch.randn(40).double()
    a = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    b = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 36, (70,))
    targets[:9] = -100
    options = {"bias": bias, "softcap": softcap, "num_token_ids": 37, "z_loss": 0.01}
    whole = linear_cross_entropy(hidden, weight + b @ a, targets, **options)
    expected = torch.autograd.grad(whole, (hidden, a, b))
    found = linear_cross_entropy(hidden, weight, targets, low_rank=(hidden @ a.t(), b), **options)
    torch.testing.assert_close(found, whole)
    for mine, theirs in zip(torch.autograd.grad(found, (hidden, a, b)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)

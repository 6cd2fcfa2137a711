import sys

import pytest
import torch
from tests.unit.models.test_decoding import PROMPT, SHAPES, tiny

from gristmill.infer.quantize import quantize
from gristmill.models import kernels
from gristmill.models.decoding import Context
from gristmill.util.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [False, True])
def test_int8_is_close(shape, own):
    pytest.importorskip("torchao")
    model = tiny(shape, scale=1.0)
    expected = Context(model).read(PROMPT)
    rounded = tiny(shape, scale=1.0).bfloat16()
    if own and kernels.use_kernels(rounded):
        pytest.skip("no kernels here")
    quantize(rounded, "int8", CPU)
    assert any(isinstance(m, kernels.Int8Linear) for m in rounded.modules()) == own
    context = Context(rounded)
    got = context.read(PROMPT[:4])
    for token in PROMPT[4:]:
        got = context.add(torch.tensor([token]), token)
    error = (got.float() - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.03


def test_the_embedding_keeps_its_values():
    pytest.importorskip("torchao")
    model = tiny("grouped", scale=1.0).bfloat16()
    before = model.embed.weight.clone()
    quantize(model, "int8", CPU)
    assert torch.equal(model.embed.weight, before)


def test_int4_is_refused_where_there_are_no_products_of_it():
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match=r"cannot multiply int4 weights \(cpu.*--quantize int8"):
        quantize(tiny().bfloat16(), "int4", CPU)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        UserError, match="needs torchao, which is not installed. Install it: .*int8"
    ):
        quantize(tiny(), "int8", CPU)

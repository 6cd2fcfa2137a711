"""Dropout of an adapter draws the same numbers where a block is computed a second time."""

from __future__ import annotations

import pytest
import torch

from gristmill.config.finetune import FinetuneLora
from gristmill.config.model import ModelConfig
from gristmill.finetune.lora import add_lora, targets
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.parallel.compile import compile_blocks, missing_for_compile
from gristmill.parallel.recompute import recompute

pytest.importorskip("peft")
CONFIG = ModelConfig(
    vocab_size=64,
    max_seq_length=32,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    intermediate_size=48,
)


def gradients(how: str | float, *, compiled: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    init_weights(model, 0)
    cfg = FinetuneLora(lora_dropout=0.5, lora_mlp=True)
    add_lora(model, cfg, targets(CONFIG, cfg))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    recompute(model, how)
    if compiled:
        compile_blocks(model, torch.device("cpu"))
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    model.train()(tokens, tokens.roll(-1, 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_blocks_drop_the_same(how):
    expected, found = gradients("none", compiled=False), gradients(how, compiled=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "selective", 0.5])
def test_recomputed_blocks_drop_the_same_compiled(how):
    if (reason := missing_for_compile(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    expected, found = gradients("none", compiled=True), gradients(how, compiled=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)

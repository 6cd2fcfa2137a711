from dataclasses import replace

import pytest
import torch

from gristmill.config.model import ModelConfig
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights, initial_value

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=64, num_layers=8, num_heads=4, intermediate_size=128, qkv_bias=True
)


def initialised(config, seed=7, dtype=torch.float32):
    model = Decoder(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(model, seed)
    return dict(model.named_parameters())


def test_every_parameter_is_filled_as_the_table_says():
    weights = initialised(CONFIG)
    for name, weight in weights.items():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            deep = name.endswith(("attn.o.weight", "mlp.down.weight"))
            std = 0.02 / 4 if deep else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(weight.mean().item()) < 0.1 * std, name


def test_values_depend_on_seed_and_name_alone():
    weights = initialised(CONFIG)
    again, other = initialised(CONFIG), initialised(CONFIG, seed=8)
    # Fewer layers leave the others as they were but for the depth scale.
    short = initialised(replace(CONFIG, num_layers=2))
    for name, weight in weights.items():
        assert torch.equal(weight, again[name])
        if name in short and not name.endswith(("o.weight", "down.weight")):
            assert torch.equal(weight, short[name])
    assert not torch.equal(weights["embed.weight"], other["embed.weight"])
    assert not torch.equal(weights["layers.0.attn.q.weight"], weights["layers.1.attn.q.weight"])


def test_precision_rounds_the_same_values():
    weights, rounded = initialised(CONFIG), initialised(CONFIG, dtype=torch.bfloat16)
    for name, weight in weights.items():
        assert torch.equal(weight.bfloat16(), rounded[name]), name


def test_global_generator_is_left_alone():
    model = Decoder(CONFIG)
    before = torch.get_rng_state()
    init_weights(model, 7)
    assert torch.equal(before, torch.get_rng_state())


def test_put_receives_every_full_value():
    model, seen = Decoder(CONFIG), {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    init_weights(model, 7, put=lambda parameter, value: seen.update({names[parameter]: value}))
    expected = initialised(CONFIG)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_unknown_parameter_is_our_mistake():
    with pytest.raises(AssertionError, match=r"layers\.0\.gadget\.weight"):
        initial_value(CONFIG, "layers.0.gadget.weight", torch.Size([4]), 1)
    with pytest.raises(AssertionError, match="scale"):
        initial_value(CONFIG, "layers.0.attn.scale", torch.Size([4]), 1)

"""Mixtral and Qwen3-MoE: words, files, counts."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.models import counts, zoo
from gristmill.models.check import check_config
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.models.zoo.weights import conversions
from gristmill.util.errors import UserError

COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
}
MIXTRAL = {**COMMON, "architectures": ["MixtralForCausalLM"]}
QWEN = {**COMMON, "architectures": ["Qwen3MoeForCausalLM"]}


def read(raw):
    return zoo.family_of(raw).from_hf_config(raw)


def experts_of(raw):
    return read(raw).moe


def test_mixtral_words():
    words = {"num_local_experts": 6, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.02}
    config = read({**MIXTRAL, **words, "sliding_window": 32})
    assert config.moe == MixtureOfExperts(
        num_experts=6, num_experts_per_token=3, intermediate_size=96, balance_loss=0.02
    )
    assert config.sliding_window == 32
    assert config.rope_theta == 1e6
    written = zoo.family("mixtral").to_hf_config(config)
    assert words.items() <= written.items()
    assert "output_router_logits" not in written


def test_what_files_leave_out_is_as_there():
    assert experts_of(MIXTRAL) == MixtureOfExperts(
        num_experts=8, num_experts_per_token=2, intermediate_size=96, balance_loss=0.001
    )
    assert experts_of(QWEN) == MixtureOfExperts(
        num_experts=128,
        num_experts_per_token=8,
        intermediate_size=768,
        normalize=False,
        balance_loss=0.001,
    )
    assert read(QWEN).sliding_window is None
    assert read({**QWEN, "rope_theta": 3e5}).rope_theta == 3e5


def test_both_names_of_the_number_of_experts():
    assert experts_of({**QWEN, "num_experts": 16}).num_experts == 16
    assert experts_of({**QWEN, "num_local_experts": 16}).num_experts == 16


def test_leading_layers_without_experts():
    raw = {**QWEN, "num_experts": 4, "mlp_only_layers": [1, 0], "moe_intermediate_size": 24}
    config = read(raw)
    assert config.expert_layers == (False, False, True)
    written = zoo.family("qwen3_moe").to_hf_config(config)
    assert written["mlp_only_layers"] == [0, 1]
    shapes = counts.parameter_shapes(config)
    assert shapes["layers.1.mlp.gate.weight"] == (96, 64)
    assert shapes["layers.2.mlp.experts.gate.weight"] == (4, 24, 64)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**QWEN, "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({**QWEN, "mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]"),
        ({**QWEN, "mlp_only_layers": [0, 1, 2]}, "none has experts"),
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ],
)
def test_other_architectures_are_refused(raw, message):
    with pytest.raises(UserError, match=message):
        read(raw)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_they_cannot_express_is_named(family):
    config = zoo.get({"mixtral": "Mixtral-8x7B-v0.1", "qwen3_moe": "Qwen3-30B-A3B"}[family])
    table = zoo.family(family)
    with pytest.raises(UserError, match="the model has none"):
        table.to_hf_config(replace(config, moe=None))
    for change in ({"num_shared_experts": 1}, {"score": "sigmoid"}, {"scale": 2.0}):
        with pytest.raises(UserError, match="cannot express moe="):
            table.to_hf_config(replace(config, moe=replace(config.moe, **change)))


def test_mixtral_files():
    config = replace(zoo.get("Mixtral-8x7B-v0.1"), num_layers=2)
    table = conversions(zoo.family("mixtral").weight_table(config), counts.parameter_shapes(config))
    lines = {line.ours: line for line in table}
    prefix = "model.layers.1.block_sparse_moe."
    assert lines["layers.1.mlp.router.weight",].theirs == (f"{prefix}gate.weight",)
    for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        line = lines[f"layers.1.mlp.experts.{ours}.weight",]
        assert line.layout == "experts"
        assert line.theirs == tuple(f"{prefix}experts.{e}.{theirs}.weight" for e in range(8))


@pytest.mark.parametrize(
    ("name", "parameters", "visited"),
    [
        ("Mixtral-8x7B-v0.1", 46_702_792_704, 12_879_925_248),
        ("Mixtral-8x22B-v0.1", 140_630_071_296, 39_161_468_928),
        ("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704),
        ("Qwen3-235B-A22B", 235_093_634_560, 22_190_763_520),
    ],
)
def test_published_sizes(name, parameters, visited):
    """All parameters, and those that one token meets (12.9B, 39B, 3.3B, 22B)."""
    config = zoo.get(name)
    assert counts.num_parameters(config) == parameters
    moe, layers = config.moe, config.num_layers
    idle = (moe.num_experts - moe.num_experts_per_token) * 3 * moe.intermediate_size
    assert parameters - layers * idle * config.hidden_size == visited


EXPERTS = MixtureOfExperts(
    num_experts=8, num_experts_per_token=3, intermediate_size=40, num_shared_experts=2
)
SMALL = ModelConfig(
    vocab_size=64, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=56, moe=EXPERTS
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "plain"}, "moe with a plain mlp"),
        ({"mlp_bias": True}, "moe with mlp_bias"),
        ({"moe": replace(EXPERTS, intermediate_size=0)}, "intermediate_size 0"),
        ({"moe": replace(EXPERTS, num_shared_experts=-1)}, "num_shared_experts -1"),
    ],
)
def test_experts_that_make_no_model_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_config(replace(SMALL, **change))


def test_operations_are_those_of_the_experts_visited():
    """As much as a dense layer of the width of three experts and two shared, and the router."""
    dense = replace(SMALL, moe=None, intermediate_size=5 * 40)
    for training, passes in ((False, 1), (True, 3)):
        found = counts.flops_per_token(SMALL, 32, training)
        router = passes * SMALL.num_layers * 2 * 8 * 48
        assert found == counts.flops_per_token(dense, 32, training) + router


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_those_of_the_decoder(bias):
    config = replace(SMALL, moe=replace(EXPERTS, selection_bias=bias, num_dense_layers=1))
    with torch.device("meta"):
        model = Decoder(config)
    held = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert held == counts.parameter_shapes(config)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_activations_are_about_what_autograd_saves(precision):
    config = replace(SMALL, num_layers=6)
    model = Decoder(config)
    init_weights(model, 0)
    if precision == "bf16-true":
        model.bfloat16()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, keep = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.arange(64).repeat(4, 2))
    estimate = counts.activation_bytes(config, 4, 128, precision)
    assert 0.8 < estimate / sum(saved.values()) < 1.2


def test_a_decoder_with_experts_learns():
    """From initial values, with its load-balancing loss, in the precision of training."""
    config = replace(SMALL, moe=replace(EXPERTS, balance_loss=0.01), vocab_size=32)
    model = Decoder(config).train()
    init_weights(model, 0)
    tokens = torch.arange(32).repeat(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]

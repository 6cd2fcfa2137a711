from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gristmill.config.model import LatentAttention, ModelConfig
from gristmill.models import counts, zoo
from gristmill.models.cache import KVCache, kv_cache_bytes
from gristmill.models.decoder import Decoder

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, num_token_ids=60
)
GROUPED = replace(SMALL, num_kv_heads=2, head_dim=16, tie_embeddings=True)
PARALLEL = replace(zoo.get("pythia-14m"), vocab_size=500, num_token_ids=490, num_layers=2)
LATENT = replace(
    SMALL,
    latent_attention=LatentAttention(
        kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
    ),
)
CONFIGS = pytest.mark.parametrize(
    "config",
    [SMALL, GROUPED, PARALLEL, LATENT],
    ids=["plain", "grouped", "parallel", "latent"],
)


@pytest.mark.parametrize("name", ["pythia-14m", "pythia-70m", "tiny-llama-1.1b", "SmolLM2-135M"])
def test_parameters_of_named_models_are_those_of_the_decoder(name):
    config = zoo.get(name)
    with torch.device("meta"):
        model = Decoder(config)
    assert counts.num_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("pythia-14m", 14_067_712),
        ("pythia-160m", 162_322_944),
        ("pythia-6.9b", 6_857_302_016),
        ("pythia-12b", 11_846_072_320),
        ("tiny-llama-1.1b", 1_100_048_384),
        ("SmolLM2-135M", 134_515_008),
        ("Llama-2-7b-hf", 6_738_415_616),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_parameters_of_named_models_are_the_published_ones(name, published):
    assert counts.num_parameters(zoo.get(name)) == published


@CONFIGS
@pytest.mark.parametrize("training", [False, True])
def test_operations_are_those_torch_counts(config, training):
    with torch.device("meta"):
        model = Decoder(config)
        tokens = torch.zeros(2, 24, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        if training:
            logits.sum().backward()
    counted = counts.flops_per_token(config, 24, training, causal=False)
    assert counter.get_total_flops() == counted * tokens.numel()


def test_causal_attention_sees_half_the_keys():
    full = counts.flops_per_token(SMALL, 101, training=False, causal=False)
    half = counts.flops_per_token(SMALL, 101, training=False)
    assert full - half == 2 * 4 * 32 * 50


def test_cache_bytes_are_those_of_the_cache():
    cache = KVCache(GROUPED, 3, 40, dtype=torch.float32)
    held = sum(tensor.nbytes for block in cache.blocks for tensor in block)
    assert kv_cache_bytes(GROUPED, 3, 40, bytes_per_value=4) == held


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@CONFIGS
def test_activations_are_about_what_autograd_saves(config, precision):
    config = replace(config, num_layers=8)
    model = Decoder(config)
    if precision == "bf16-true":
        model.bfloat16()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    keep = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)
        return tensor

    tokens = torch.zeros(4, 256, dtype=torch.int64)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        model.hidden(tokens)
    estimate = counts.activation_bytes(config, 4, 256, precision)
    assert 0.8 < estimate / sum(saved.values()) < 1.2


def test_memory_grows_with_each_of_its_parts():
    base = counts.training_memory_bytes(SMALL, 2, 64, "32-true")
    state = counts.num_parameters(SMALL) * 16
    assert base > state + counts.activation_bytes(SMALL, 2, 64, "32-true")
    assert counts.training_memory_bytes(SMALL, 4, 64, "32-true") > base
    assert counts.training_memory_bytes(SMALL, 2, 64, "bf16-true") < base

"""Low-rank adapters in our decoder: what is trained, what they begin with, what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gristmill.config.finetune import FinetuneAdapter, FinetuneLora
from gristmill.config.model import AdaptionPrompt, LatentAttention, MixtureOfExperts, ModelConfig
from gristmill.config.sections import Parallel
from gristmill.finetune.adapter import Adapter
from gristmill.finetune.lora import Lora, targets
from gristmill.formats import hf, tuned
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.train.method import Method
from gristmill.util.errors import UserError

pytest.importorskip("peft")

CONFIG = ModelConfig(
    vocab_size=64,
    max_seq_length=32,
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
)
EVERYTHING = dict.fromkeys(("lora_key", "lora_projection", "lora_mlp", "lora_head"), True)


@pytest.fixture
def base(tmp_path):
    model = Decoder(CONFIG)
    init_weights(model, 0)
    hf.write(tmp_path / "base", CONFIG, model.state_dict(), tokenizer_dir=None)
    return tmp_path / "base"


def adapted(method, base, seed: int = 0) -> Decoder:
    """The model as the loop builds it: on the meta device, then with values."""
    with torch.device("meta"):
        model = Decoder(CONFIG)
        method.adapt(model)
    model.to_empty(device="cpu")
    job = SimpleNamespace(start_dir=base, model=CONFIG, cfg=SimpleNamespace(seed=seed))
    method.fill(model, job)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


METHODS = {
    "default": Lora(FinetuneLora()),
    "everything": Lora(FinetuneLora(**EVERYTHING)),
    "dora": Lora(FinetuneLora(lora_dora=True, **EVERYTHING)),
    "prompts": Adapter(FinetuneAdapter(adapter_start_layer=1)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_begins_with_the_base(method, base):
    plain = Decoder(CONFIG)
    init_weights(plain, 0)
    model = adapted(method, base).eval()
    torch.testing.assert_close(model(tokens()), plain(tokens()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_only_the_adapter_is_trained_and_all_of_it(method, base):
    model = adapted(method, base).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "gate" in name.rpartition(".")[2]:
                parameter += 0.1  # at zero what is behind it has no gradient
    model(tokens(), tokens().roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        own = tuned.plain_name(name) is not None
        assert own != parameter.requires_grad, name
        assert (parameter.grad is None) == own, name
        assert own or parameter.grad.abs().sum() > 0, name
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method.num_saved(CONFIG) == trained


def test_the_same_seed_draws_the_same_adapter(base):
    method = METHODS["everything"]
    one, same, other = (tuned.factors(adapted(method, base, s).state_dict()) for s in (0, 0, 1))
    assert len(one) == 3 * 7 + 1
    for name, factors in one.items():
        assert torch.equal(factors.a, same[name].a)
        assert not torch.equal(factors.a, other[name].a)
        assert not factors.b.any()


def test_adapters_stay_fp32_beside_a_model_in_bf16(base):
    for method in METHODS.values():
        with torch.device("meta"):
            model = Decoder(CONFIG).to(torch.bfloat16)
            method.adapt(model)
        for name, parameter in model.named_parameters():
            expected = torch.float32 if parameter.requires_grad else torch.bfloat16
            assert parameter.dtype is expected, name
        model.to_empty(device="cpu")
        job = SimpleNamespace(start_dir=base, model=CONFIG, cfg=SimpleNamespace(seed=0))
        method.fill(model, job)
        assert model(tokens()).dtype is torch.bfloat16


def test_dropout_is_of_training_only(base):
    model = adapted(Lora(FinetuneLora(lora_dropout=0.5)), base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.5
        assert not torch.equal(model.train()(tokens()), model(tokens()))
        assert torch.equal(model.eval()(tokens()), model(tokens()))


def test_matrices_are_chosen_by_option():
    names = targets(CONFIG, FinetuneLora())
    assert names == [f"layers.{i}.attn.{m}" for i in range(3) for m in "qv"]
    only_head = FinetuneLora(lora_query=False, lora_value=False, lora_head=True)
    assert targets(CONFIG, only_head) == ["head"]
    latent = LatentAttention(
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
    )
    config = replace(CONFIG, num_layers=1, num_kv_heads=None, latent_attention=latent)
    inner = [name.removeprefix("layers.0.attn.") for name in targets(config, FinetuneLora())]
    assert inner == ["q_down", "q_up", "kv_down", "kv_up"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_r": 0}, "--lora_r 0"),
        ({"lora_alpha": -1}, "--lora_alpha -1"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        ({"lora_query": False, "lora_value": False}, "nothing to train"),
        ({"parallel": Parallel(tensor=2)}, "--parallel.tensor 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Lora(FinetuneLora(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_prompt_length": 0}, "nothing to train"),
        ({"adapter_start_layer": -1}, "counted from 0"),
        ({"parallel": Parallel(tensor=2)}, "--parallel.tensor 2"),
    ],
)
def test_settings_of_prompts_that_cannot_work_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Adapter(FinetuneAdapter(**options))


def test_what_does_not_suit_the_model_is_refused():
    tied = replace(CONFIG, tie_embeddings=True)
    with pytest.raises(UserError, match="is its embedding"):
        Lora(FinetuneLora(lora_head=True)).check(tied)
    moe = replace(CONFIG, moe=MixtureOfExperts(num_experts=4, intermediate_size=8))
    with pytest.raises(UserError, match="experts"):
        Lora(FinetuneLora(lora_mlp=True)).check(moe)
    Lora(FinetuneLora()).check(moe)
    with pytest.raises(UserError, match="has 3 blocks"):
        Adapter(FinetuneAdapter(adapter_start_layer=3)).check(CONFIG)
    prompted = replace(CONFIG, adaption_prompt=AdaptionPrompt(length=2, num_layers=1))
    for method in (Method(), *METHODS.values()):
        with pytest.raises(UserError, match="Train its base"):
            method.check(prompted)


def test_without_peft_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gristmill.finetune.lora.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Install it: .*\[finetune\]"):
        Lora(FinetuneLora())

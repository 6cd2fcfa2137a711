"""Adapters against PEFT: what we write loads there, what is made there loads here, and numbers."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from families import CASES, TINY

from gristmill.config.finetune import FinetuneLora
from gristmill.config.model import AdaptionPrompt
from gristmill.finetune import lora
from gristmill.formats import peft as peft_files
from gristmill.formats import tuned
from gristmill.formats.adapted import AdapterFiles
from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.formats.peft_lora import lora_files
from gristmill.formats.peft_prompts import peft_lacks_prompts, prompt_files
from gristmill.models import zoo
from gristmill.models.decoder import Decoder
from gristmill.util.errors import UserError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SOME = [name for name in CASES if "-" not in name]
"""One of each family, and those whose tensors lie in other ways."""
SOME += ["falcon-7b", "neox-parallel", "neox-no-bias", "deepseek_v2-lite"]
PROMPTED = ["llama", "llama-tied", "mistral", "mistral-window", "gpt2"]
ALL = {name: True for name in (*lora.MATRICES, "lora_head")}


def build(name: str, directory: Path):
    """A random model of transformers, written to a directory, with its own random biases."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 90, (3, 40), generator=torch.Generator().manual_seed(1))


def settings(config, **options) -> FinetuneLora:
    """All matrices that the model can have an adapter on, unless told otherwise."""
    chosen = ALL | {"lora_head": not config.tie_embeddings, "lora_mlp": config.moe is None}
    return FinetuneLora(lora_r=3, lora_alpha=7, lora_dropout=0.0, **(chosen | options))


def with_adapter(model: Decoder, cfg: FinetuneLora) -> Decoder:
    """The model with random adapters."""
    lora.add_lora(model, cfg, lora.targets(model.config, cfg))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter += 0.1 * noise
                else:
                    parameter.copy_(0.2 * noise)
    return model.eval()


def write_adapter(model: Decoder, cfg: FinetuneLora, base: Path, out: Path) -> None:
    parameters = open_model_dir(base).parameters()
    files = lora_files(
        model.config,
        tuned.factors(model.state_dict()),
        alpha=cfg.lora_alpha,
        dropout=cfg.lora_dropout,
        base=str(base),
        row_lengths=partial(lora._row_lengths, parameters),
    )
    peft_files.write(out, files)


def loaded_there(base: Path, adapter: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["all", "default", "dora"])
@torch.no_grad()
def test_our_adapter_has_equal_logits_there_and_here(name, kind, tmp_path):
    """With fused matrices of which all, or two of three, have an adapter."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build(name, base)
    model = load_model(base)
    options = {
        "all": {},
        "default": {"lora_key": False, "lora_mlp": False, "lora_head": False},
        "dora": {"lora_dora": True, "lora_key": False},
    }[kind]
    cfg = settings(model.config, **options)
    plain = model(tokens())
    ours = with_adapter(model, cfg)
    write_adapter(ours, cfg, base, adapter)
    expected = ours(tokens())
    assert (expected - plain).abs().max() > 0.05
    close = partial(torch.testing.assert_close, atol=5e-5, rtol=1e-4)
    close(loaded_there(base, adapter)(tokens()).logits, expected)
    close(load_model(adapter)(tokens()), expected)


@pytest.mark.parametrize("name", [n for n in SOME if n not in ("mixtral", "qwen3_moe")])
@torch.no_grad()
def test_an_adapter_made_there_has_equal_logits_here(name, tmp_path):
    """One adapter over fused matrices, which no adapter of ours has; rank-stabilised."""
    theirs = build(name, tmp_path / "base")
    config = peft.LoraConfig(
        r=5,
        lora_alpha=3,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={r".*\.1\..*": 2},
        alpha_pattern={r".*\.1\..*": 9},
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )
    theirs.name_or_path = str(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, config).eval()
    if "deepseek" in name:
        return
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "adapter")(tokens())
    torch.testing.assert_close(adapted(tokens()).logits, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PROMPTED)
@torch.no_grad()
def test_adaption_prompts_have_equal_logits_there_and_here(name, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build(name, base)
    plain = load_model(base)
    projected = zoo.family(plain.config.family).adaption.projected
    prompt = AdaptionPrompt(length=5, num_layers=1, projected=projected)
    config = dataclasses.replace(plain.config, adaption_prompt=prompt)
    if config.head_dim is not None:
        assert "hidden_size / num_heads" in peft_lacks_prompts(config)
        return
    ours = Decoder(config).eval()
    own = plain.state_dict()
    generator = torch.Generator().manual_seed(2)
    for key, parameter in ours.named_parameters():
        value = own[key] if key in own else torch.randn(parameter.shape, generator=generator)
        parameter.copy_(value)
    expected = ours(tokens())
    assert (expected - plain(tokens())).abs().max() > 0.05
    peft_files.write(adapter, prompt_files(config, ours.state_dict(), base=str(base)))
    close = partial(torch.testing.assert_close, atol=5e-5, rtol=1e-4)
    close(load_model(adapter)(tokens()), expected)
    there = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    there = peft.PeftModel.from_pretrained(there, adapter).eval()
    close(there(tokens()).logits, expected)


def test_what_is_not_known_is_refused(tmp_path):
    build("llama", tmp_path / "base")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    for more, words in (
        ({"peft_type": "IA3"}, "kind IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"base_model_name_or_path": "nobody/nothing"}, "gristmill download nobody/nothing"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ):
        peft_files.write(tmp_path / "a", AdapterFiles({}, config | more))
        with pytest.raises(UserError, match=words):
            open_model_dir(tmp_path / "a")

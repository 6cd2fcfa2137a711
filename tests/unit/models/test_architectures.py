"""What `config.json` of an architecture comes to, and what of it is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gristmill.config.model import ModelConfig
from gristmill.models import zoo
from gristmill.util.errors import UserError

BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}


def parse(family: str, **words) -> ModelConfig:
    base = GPT2 if family == "gpt2" else BASE
    return zoo.family(family).from_hf_config({**base, **words})


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("pythia", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True. Supported: False"),
        ("falcon", {"alibi": True}, "alibi is True. Supported: False"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads is 2 of 4"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn is 3. Supported: 1, 2",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False. Supported: True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("olmo", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        ("starcoder2", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_word_and_value(family, words, message):
    with pytest.raises(UserError, match=message):
        parse(family, **words)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("pythia", {"num_kv_heads": 2}, "num_kv_heads=2"),
        ("pythia", {"shared_norm": True}, "shared_norm=True"),
        ("stablelm", {"parallel_residual": True}, "shared_norm=False"),
        ("falcon", {"parallel_residual": False, "num_kv_heads": 2}, "parallel_residual=False"),
        ("gpt2", {"sliding_window": 8}, "sliding_window=8"),
        ("olmo", {"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ("olmo2", {"pre_norm": True}, "pre_norm=True"),
        ("olmo3", {"qk_norm": "head"}, "qk_norm=head"),
        ("nanochat", {"mlp": "gated"}, "mlp=gated"),
        ("starcoder2", {"sliding_window": 8, "sliding_pattern": (True, False)}, "sliding_pattern"),
    ],
)
def test_what_an_architecture_has_no_word_for_is_not_written(family, changes, named):
    config = replace(parse(family), **changes)
    with pytest.raises(UserError, match=named):
        zoo.family(family).to_hf_config(config)


def test_both_generations_of_falcon():
    first = parse("falcon", num_kv_heads=4)  # Falcon-7B's file says as many as heads, and has one
    assert (first.kv_heads, first.parallel_residual, first.shared_norm) == (1, True, True)
    second = parse("falcon", new_decoder_architecture=True, num_kv_heads=2)
    assert (second.kv_heads, second.parallel_residual, second.shared_norm) == (2, True, False)
    third = parse("falcon", new_decoder_architecture=True, num_ln_in_parallel_attn=1)
    assert (third.kv_heads, third.shared_norm) == (4, True)
    assert first.tie_embeddings
    assert first.intermediate_size == 4 * 64
    words = zoo.family("falcon").to_hf_config
    assert words(first)["multi_query"]
    assert not words(first)["new_decoder_architecture"]
    assert words(second)["new_decoder_architecture"]
    assert words(second)["num_ln_in_parallel_attn"] == 2


def test_olmo3_scales_the_frequencies_of_blocks_that_see_everything_only():
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    old = parse("olmo3", rope_theta=1e5, rope_scaling=yarn)
    new = parse(
        "olmo3",
        rope_parameters={
            "full_attention": {"rope_theta": 1e5, **yarn},
            "sliding_attention": {"rope_theta": 1e5, "rope_type": "default"},
        },
    )
    assert old == new
    assert (old.rope_theta, old.rope_local_theta) == (1e5, 1e5)
    assert old.windows == (4096, 4096, 4096, None)
    assert parse("olmo3").rope_theta == 5e5
    same = {"full_attention": yarn, "sliding_attention": yarn}
    assert parse("olmo3", rope_parameters=same).rope_local_theta is None
    assert parse("olmo3", sliding_window=None).windows == (None,) * 4
    for config in (old, parse("olmo3", rope_parameters=same), parse("olmo3")):
        family = zoo.family("olmo3")
        assert family.from_hf_config(family.to_hf_config(config)) == config


def test_null_takes_the_cap_of_the_logits_away():
    assert parse("nanochat").logit_softcap == 15.0
    assert parse("nanochat", final_logit_softcapping=None).logit_softcap is None


def test_a_parallel_stablelm_has_one_norm_for_both_branches():
    config = parse("stablelm", use_parallel_residual=True)
    assert config.parallel_residual
    assert config.shared_norm
    assert config.rope_fraction == 0.25


def test_the_page_about_families_shows_the_files_as_they_are():
    root = Path(__file__).parents[3]
    page = (root / "docs" / "adding-a-family.md").read_text()
    files = [
        (root / name).read_text()
        for name in ("src/gristmill/models/zoo/starcoder2.py", "tests/parity/families.py")
    ]
    blocks = [
        "".join(line[4:] if line.strip() else line for line in block.splitlines(keepends=True))
        for block in re.findall(r"(?m)(?:^(?: {4}.*)?\n)+", page)
        if block.strip()
    ]
    code = [block.strip("\n") for block in blocks if "gristmill " not in block]
    shown = [block for block in code if not block.startswith(".venv")]
    assert len(shown) == 4
    for block in shown:
        assert any(block in text for text in files), block


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_quantised_weights_are_refused_with_what_to_do(name):
    family = zoo.FAMILIES[name]
    raw = family.to_hf_config(next(iter(family.models.values())).config)
    raw["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(UserError, match=r"quantised \(quantization_config, gptq\).* bf16|16-bit"):
        family.from_hf_config(raw)

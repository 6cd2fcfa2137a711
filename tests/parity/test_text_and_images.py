"""Models of text and images: their text model is read, and written alone."""

from __future__ import annotations

import json

import pytest
import torch
from families import TINY

from gristmill.formats import hf
from gristmill.formats.model_dir import load_model, read_config
from gristmill.models import zoo
from gristmill.util.errors import UserError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = {
    **TINY,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def theirs(tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=[1, 106]
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    model.save_pretrained(tmp_path / "theirs")
    return model


def as_on_the_hub(directory):
    """The names of tensors and words of `config.json` that the published files have."""
    path = directory / "model.safetensors"
    tensors = {}
    for name, tensor in safetensors.load_file(path).items():
        if name.startswith("model.language_model."):
            name = name.replace("model.language_model.", "language_model.model.")
        tensors[name.removeprefix("model.") if "language_model" not in name else name] = tensor
    assert any(name.startswith("vision_tower.") for name in tensors)
    assert any(name.startswith("language_model.model.layers.") for name in tensors)
    safetensors.save_file(tensors, path, {"format": "pt"})
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {**TEXT, "model_type": "gemma3_text"},
        "vision_config": VISION,
    }
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("published", [False, True])
def test_the_text_model_gives_the_same_numbers(theirs, tmp_path, published):
    if published:
        as_on_the_hub(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.windows == (8, 8, None)
    assert (ours.config.rope_theta, ours.config.rope_local_theta) == (1e6, 1e4)
    tokens = torch.randint(2, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)
    hf.write(tmp_path / "ours", ours.config, ours.state_dict(), tokenizer_dir=None)
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert raw["architectures"] == ["Gemma3ForCausalLM"]
    assert (raw["model_type"], raw["eos_token_id"]) == ("gemma3_text", [1, 106])
    assert read_config(tmp_path / "ours") == ours.config
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    torch.testing.assert_close(back(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_a_text_config_leaves_out_is_the_architectures_own():
    """The published file of the size with 4 billion parameters says no more than this."""
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    found, named = zoo.family_of(raw).from_hf_config(raw), zoo.get("Gemma-3-4b-it")
    own = {"name": "", "bos_token_id": 2, "eos_token_id": None}
    assert vars(found) | own == vars(named) | own
    assert found.eos_token_id == (1, 106)


def test_attention_to_the_future_is_refused():
    raw = {**TEXT, "architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}
    with pytest.raises(UserError, match="use_bidirectional_attention"):
        zoo.family_of(raw).from_hf_config(raw)

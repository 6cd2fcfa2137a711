"""The Python on the page for people who come from nanoGPT: its tokens and its checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gristmill.cli import main
from gristmill.data.store.dataset import Dataset
from gristmill.formats.model_dir import load_model

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "coming-from" / "nanogpt.md"
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_tokens_without_a_header(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {}
    for side, count in (("train", 5000), ("val", 700)):
        expected[side] = np.random.default_rng(count).integers(0, 50257, count).astype(np.uint16)
        expected[side].tofile(f"{side}.bin")
    exec(snippets()[0], {})
    assert main(["data", "import", "packed", "--copy", "--output_dir", "data/mine"]) == 0
    for side, tokens in expected.items():
        found = Dataset.open(tmp_path / "data/mine" / side).map(0).tokens
        assert np.array_equal(found, tokens)


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint(tmp_path, monkeypatch, bias):
    monkeypatch.chdir(tmp_path)
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu")).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("bias"):
                parameter.normal_() if bias else parameter.zero_()
    state = {
        f"_orig_mod.{name}": value.t().contiguous() if name.endswith(TURNED) else value
        for name, value in source.state_dict().items()
        if bias or not name.endswith("bias")
    }
    args = {"block_size": 32, "bias": bias, **sizes}
    Path("out").mkdir()
    torch.save({"model": state, "model_args": args, "iter_num": 3}, "out/ckpt.pt")
    exec(snippets()[1], {})
    ids = torch.tensor([[1, 5, 9, 63, 0, 2]])
    with torch.no_grad():
        assert torch.allclose(load_model("nanogpt-hf")(ids), source(ids).logits, atol=1e-5)

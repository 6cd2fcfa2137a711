"""LitGPT's `lit_model.pth.lora`, not merged, with its base elsewhere."""

from __future__ import annotations

import pytest
import torch
import yaml

from gristmill.config.finetune import Merge
from gristmill.config.model import ModelConfig
from gristmill.finetune.merge import merge
from gristmill.formats import litgpt
from gristmill.formats.model_dir import load_model, open_model_dir
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.util.errors import UserError

CONFIG = ModelConfig(
    vocab_size=64,
    max_seq_length=32,
    num_layers=1,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=24,
)
RANK, ALPHA = 2, 5


@pytest.fixture
def files(tmp_path):
    """A base, an adapter of queries and values and of one feed-forward matrix, and the sums."""
    model = Decoder(CONFIG)
    init_weights(model, 0)
    litgpt.write(tmp_path / "base", CONFIG, model.state_dict(), tokenizer_dir=None)
    torch.manual_seed(0)
    q_a, v_a, up_a = (torch.randn(RANK, 16) for _ in range(3))
    q_b, v_b, up_b = torch.randn(16, RANK), torch.randn(8, RANK), torch.randn(24, RANK)
    block = "_orig_mod.transformer.h.0."
    tensors = {
        f"{block}attn.qkv.lora_A": torch.cat([q_a, v_a]),
        f"{block}attn.qkv.lora_B": torch.cat([q_b, v_b]),
        f"{block}mlp.fc_2.lora_A": up_a,
        f"{block}mlp.fc_2.lora_B": up_b,
    }
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    torch.save({"model": tensors}, final / "lit_model.pth.lora")
    settings = {"checkpoint_dir": str(tmp_path / "base"), "lora_r": RANK, "lora_alpha": ALPHA}
    settings |= {"lora_query": True, "lora_key": False, "lora_value": True, "lora_mlp": True}
    (final / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    with torch.no_grad():
        for name, a, b in (("q", q_a, q_b), ("v", v_a, v_b)):
            getattr(model.layers[0].attn, name).weight += ALPHA / RANK * b @ a
        model.layers[0].mlp.up.weight += ALPHA / RANK * up_b @ up_a
    return tmp_path, dict(model.named_parameters())


def assert_same(path, expected) -> None:
    found = open_model_dir(path).parameters()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-6, rtol=1e-6)


def test_it_is_read_with_its_base(files):
    root, expected = files
    for path in (root / "run", root / "run" / "final", root / "run" / "final/lit_model.pth.lora"):
        assert_same(path, expected)
    assert load_model(root / "run")(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 64)


def test_merging_puts_the_model_beside_it(files, capsys):
    root, expected = files
    final = root / "run" / "final"
    merge(Merge(checkpoint_dir=str(root / "run")))
    assert (final / "lit_model.pth").is_file()
    assert sorted(path.name for path in (root / "run").iterdir()) == ["final"]
    assert_same(final, expected)
    assert "litgpt chat" in capsys.readouterr().out
    merge(Merge(checkpoint_dir=str(final)))
    assert "merged already" in capsys.readouterr().out


def test_a_base_that_has_moved_is_named(files):
    root, expected = files
    (root / "base").rename(root / "elsewhere")
    with pytest.raises(UserError, match="is an adapter for the model .*base, which is not here"):
        open_model_dir(root / "run")
    options = {"pretrained_checkpoint_dir": str(root / "elsewhere"), "precision": "32-true"}
    merge(Merge(checkpoint_dir=str(root / "run"), output_dir=str(root / "out"), **options))
    assert_same(root / "out", expected)


def test_what_is_damaged_or_of_another_model_is_said(files):
    root, _ = files
    final = root / "run" / "final"
    text = (final / "hyperparameters.yaml").read_text()
    (final / "hyperparameters.yaml").write_text(text.replace("lora_r: 2", "lora_r: 0"))
    with pytest.raises(UserError, match="missing or damaged"):
        open_model_dir(final)
    (final / "hyperparameters.yaml").write_text(text.replace("lora_key: false", "lora_key: true"))
    with pytest.raises(UserError, match="is for a matrix"):
        dict(open_model_dir(final).parameters())
    tensors = {"transformer.h.7.mlp.fc_2.lora_A": torch.zeros(2, 16)}
    (final / "hyperparameters.yaml").write_text(text)
    torch.save({"model": tensors}, final / "lit_model.pth.lora")
    with pytest.raises(UserError, match="has no place"):
        open_model_dir(final)


def test_what_is_no_adapter_is_said(files):
    root, _ = files
    with pytest.raises(UserError, match="is a model and no adapter"):
        merge(Merge(checkpoint_dir=str(root / "base")))
    with pytest.raises(UserError, match="no adapter is named"):
        merge(Merge())
    with pytest.raises(UserError, match="both say the type"):
        merge(Merge(checkpoint_dir=str(root), dtype="float32", precision="32-true"))

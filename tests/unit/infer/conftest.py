"""Tiny random models with real tokenizers, as Hugging Face directories made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from gristmill.config.model import ModelConfig
from gristmill.formats import hf
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights

SPECIAL = ["<eos>", "<bos>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_model(folder: Path, *, template: str | None = None, context: int = 96) -> Path:
    """A random two-layer Llama with a byte-level tokenizer of 260 ids."""
    words = folder / "tokenizer"
    words.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(words / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    (words / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (words / "chat_template.jinja").write_text(template)
    model = Decoder(tiny_config(context))
    init_weights(model, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far enough from uniform that no two logits tie
    out = folder / "model"
    hf.write(out, model.config, dict(model.state_dict()), tokenizer_dir=words)
    return out


def tiny_config(context: int = 96) -> ModelConfig:
    return ModelConfig(
        vocab_size=260,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        max_seq_length=context,
        eos_token_id=0,
        bos_token_id=1,
    )


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a text where the command reads its prompts."""

    def pipe(text: str) -> None:
        (tmp_path / "stdin").write_text(text)
        monkeypatch.setattr("sys.stdin", (tmp_path / "stdin").open())

    return pipe

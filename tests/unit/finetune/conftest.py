"""A tokenizer of bytes with a chat's control tokens, and a model too small to be slow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from gristmill.config.model import ModelConfig
from gristmill.formats.hf import write
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.tokenizer.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


CONTROLS = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|start|>")


def write_tokenizer(
    folder: Path,
    chat_template: str | None = None,
    *,
    names: Sequence[str] = CONTROLS,
    bos_token: str = "<|start|>",
    eos_token: str = "<|end|>",
    bos: bool = False,
) -> Path:
    """A byte-level tokenizer without merges: every byte is a token, and the control tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    words = {"eos_token": eos_token, "bos_token": bos_token, "add_bos_token": bos}
    if chat_template is not None:
        words["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Make a tokenizer with a chat template, or without one."""

    def make(chat_template: str | None = None, *, bos: bool = False) -> Tokenizer:
        return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", chat_template, bos=bos))

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny random model."""
    root = tmp_path_factory.mktemp("base")
    config = ModelConfig(
        name="tiny",
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        vocab_size=260,
        max_seq_length=512,
    )
    model = Decoder(config)
    init_weights(model, 0)
    with torch.no_grad():
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = write_tokenizer(root / "tokenizer")
    write(root / "model", config, tensors, tokenizer_dir=tokens)
    return root / "model"

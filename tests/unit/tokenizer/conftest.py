from functools import cache
from pathlib import Path

import pytest

from gristmill.config.commands import TokenizerTrain
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.tokenizer.train import train_bpe

REPO = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def texts():
    """Some of this package's own sources, and some other languages."""
    paths = sorted((REPO / "src/gristmill/models").rglob("*.py"))
    sources = [path.read_text("utf-8") for path in paths]
    other = "Größe und Maß. Привет, мир! 你好，世界。 שלום עולם. ¿Qué tal? 🙂👩\u200d👧\n" * 20
    return [*sources, other]


@pytest.fixture(scope="session")
def trained_dir(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "tok"
    train_bpe(
        texts,
        TokenizerTrain(
            out_dir=str(out), vocab_size=2000, bos_token="<|bos|>", special_tokens=["<|user|>"]
        ),
    )
    return out


@pytest.fixture
def trained(trained_dir):
    return Tokenizer.load(trained_dir)


@pytest.fixture
def stories_dir(shared):
    return shared / "data/models/stories260K/hf"


@pytest.fixture(params=["trained", "tokenizers/gpt2", "tokenizers/neox", "models/stories260K/hf"])
def any_tokenizer(request, trained_dir):
    if request.param == "trained":
        return _loaded(trained_dir)
    return _loaded(request.getfixturevalue("shared") / "data" / request.param)


@cache
def _loaded(path):
    return Tokenizer.load(path)

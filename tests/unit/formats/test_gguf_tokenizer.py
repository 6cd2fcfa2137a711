"""Tokenizers into GGUF files and out of them."""

import json
from dataclasses import replace

import pytest
from test_gguf import TEXTS, small, write

from gristmill.config.commands import TokenizerTrain
from gristmill.formats import gguf
from gristmill.formats.model_dir import load_model, open_model_dir, read_config
from gristmill.tokenizer import gguf_vocabulary
from gristmill.tokenizer import sentencepiece_proto as proto
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.tokenizer.train import train_bpe
from gristmill.util.errors import UserError
from gristmill.util.gguf_header import read_header


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "tok"
    text = [*TEXTS, "the quick brown fox, 12 345 don't. " * 200]
    cfg = TokenizerTrain(
        out_dir=str(out), vocab_size=300, bos_token="<|bos|>", special_tokens=["<|user|>"]
    )
    train_bpe(text, cfg)
    (out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (out / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return out


def test_a_tokenizer_of_ours_goes_along(tmp_path, tokenizer_dir):
    config = small("Llama-2-7b-hf", vocab_size=320)
    write(tmp_path / "m.gguf", config, tokenizer_dir=tokenizer_dir)
    here, there = Tokenizer.load(tokenizer_dir), Tokenizer.load(tmp_path / "m.gguf")
    metadata = read_header(tmp_path / "m.gguf").metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 320
    assert metadata["tokenizer.ggml.pre"] == "smaug-bpe"  # Llama 3's splits, merges first
    assert metadata["tokenizer.ggml.eot_token_id"] == 2
    assert there.digest == here.digest
    assert (there.bos_id, there.eos_id, there.stop_ids) == (here.bos_id, here.eos_id, (1, 2))
    assert there.chat_template == here.chat_template
    assert there.adds_bos is here.adds_bos is True
    config = read_config(tmp_path)
    assert (config.num_token_ids, config.eos_token_id) == (here.num_token_ids, (1, 2))


def test_the_words_of_llama_cpp_alone_make_the_same_tokenizer(tmp_path, tokenizer_dir, monkeypatch):
    describe = gguf_vocabulary.describe

    def without_json(*arguments):
        words = describe(*arguments)
        del words["tokenizer.huggingface.json"]
        return words

    monkeypatch.setattr(gguf_vocabulary, "describe", without_json)
    write(tmp_path / "m.gguf", small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tokenizer_dir)
    here, there = Tokenizer.load(tokenizer_dir), Tokenizer.load(tmp_path)
    assert there.digest != here.digest
    assert there.num_token_ids == here.num_token_ids
    assert set(there.special_tokens) == set(here.special_tokens)
    assert there.adds_bos
    for text in TEXTS:
        for special in (False, True):
            ids = here.encode(text, special=special)
            assert there.encode(text, special=special) == ids
        assert there.decode(here.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_published_tokenizers(tmp_path, shared, name):
    folder = shared / "data/tokenizers" / name
    here = Tokenizer.load(folder)
    config = small("Llama-2-7b-hf", vocab_size=here.num_token_ids, hidden_size=8, num_heads=1)
    write(tmp_path / "m.gguf", replace(config, num_kv_heads=1), tokenizer_dir=folder)
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == "gpt-2"
    there = Tokenizer.load(tmp_path / "m.gguf")
    assert all(there.encode(text) == here.encode(text) for text in TEXTS)


def test_sentencepiece_goes_along(tmp_path, shared):
    pytest.importorskip("sentencepiece")
    folder = shared / "data/models/stories260K/hf"
    source = open_model_dir(folder)
    gguf.write(
        tmp_path / "m.gguf",
        source.config,
        source.parameters(),
        tokenizer_dir=folder,
        dtype="float32",
    )
    here, there = Tokenizer.load(folder), Tokenizer.load(tmp_path / "m.gguf")
    assert there.kind == "sentencepiece"
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "llama"
    assert (there.bos_id, there.eos_id, there.adds_bos) == (here.bos_id, here.eos_id, here.adds_bos)
    texts = [*TEXTS, "Once upon a time", " a", "a  b   c", "", "\n"]
    assert [there.encode(t) for t in texts] == [here.encode(t) for t in texts]
    assert [there.decode(here.encode(t)) for t in texts] == [
        here.decode(here.encode(t)) for t in texts
    ]
    assert read_config(tmp_path) == source.config


def test_a_directory_beside_the_file_wins(tmp_path, tokenizer_dir):
    write(tmp_path / "m.gguf", small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tokenizer_dir)
    Tokenizer.load(tokenizer_dir).save(tmp_path)
    assert Tokenizer.load(tmp_path).path == tmp_path / "tokenizer.json"


def edit(path, tokenizer_dir, monkeypatch, **words):
    """A file with other words about its tokenizer; None takes one out."""
    describe = gguf_vocabulary.describe

    def changed(*arguments):
        out = describe(*arguments) | {f"tokenizer.ggml.{key}": v for key, v in words.items()}
        out.pop("tokenizer.huggingface.json")
        return {key: value for key, value in out.items() if value is not None}

    with monkeypatch.context() as patch:
        patch.setattr(gguf_vocabulary, "describe", changed)
        write(path, small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tokenizer_dir)


def test_unknown_splits(tmp_path, tokenizer_dir, monkeypatch):
    edit(tmp_path / "m.gguf", tokenizer_dir, monkeypatch, pre="of-tomorrow")
    with pytest.raises(UserError, match=r"m\.gguf parts text by the rules 'of-tomorrow'.*--tokeni"):
        Tokenizer.load(tmp_path / "m.gguf")
    assert load_model(tmp_path)  # the model itself is fine


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", r"m\.gguf has a tokenizer of the kind 'bert'"),
        ("none", r"no tokenizer at .*m\.gguf \(there is none in it\)"),
        (None, r"no tokenizer at .*m\.gguf \(there is none in it\)"),
    ],
)
def test_unknown_tokenizers(tmp_path, tokenizer_dir, monkeypatch, kind, message):
    edit(tmp_path / "m.gguf", tokenizer_dir, monkeypatch, model=kind)
    with pytest.raises(UserError, match=rf"{message}.*--tokenizer_dir"):
        Tokenizer.load(tmp_path / "m.gguf")
    Tokenizer.load(tokenizer_dir).save(tmp_path)
    beside = Tokenizer.load(tmp_path / "m.gguf")
    assert beside.path == tmp_path / "tokenizer.json"


def sentencepiece_dir(folder, **changes):
    texts = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a"]
    kinds = [proto.UNKNOWN, proto.CONTROL, proto.CONTROL, *[proto.NORMAL] * 5]
    pieces = tuple(proto.Piece(t, -float(n), k) for n, (t, k) in enumerate(zip(texts, kinds)))
    model = proto.Model(**{"pieces": pieces, **changes})
    folder.mkdir()
    roles = {"unk": 0, "bos": 1, "eos": 2}
    (folder / "tokenizer.model").write_bytes(proto.write_model(model, roles))
    return model


def test_tokens_beside_a_sentencepiece_model_go_along(tmp_path):
    pytest.importorskip("sentencepiece")
    folder = tmp_path / "tok"
    model = sentencepiece_dir(folder, add_space_prefix=False)
    assert proto.read_model((folder / "tokenizer.model").read_bytes()) == model
    (folder / "added_tokens.json").write_text('{"<|end|>": 10}')
    config = small("Llama-2-7b-hf", vocab_size=12)
    write(tmp_path / "m.gguf", config, tokenizer_dir=folder)
    here, there = Tokenizer.load(folder), Tokenizer.load(tmp_path / "m.gguf")
    assert there.num_token_ids == here.num_token_ids == 11
    for text in ("ab a", "a<|end|>b"):
        for special in (False, True):
            assert there.encode(text, special=special) == here.encode(text, special=special)
    assert there.encode("<|end|>", special=True) == [10]


@pytest.mark.parametrize(
    "changes",
    [{"model_type": proto.UNIGRAM}, {"remove_extra_spaces": True}],
    ids=str,
)
def test_sentencepiece_models_that_llama_cpp_reads_otherwise(tmp_path, changes):
    pytest.importorskip("sentencepiece")
    sentencepiece_dir(tmp_path / "tok", **changes)
    with pytest.raises(UserError, match=r"no SentencePiece model that llama\.cpp reads exactly"):
        write(tmp_path / "m.gguf", small("Llama-2-7b-hf"), tokenizer_dir=tmp_path / "tok")


def test_splits_that_llama_cpp_does_not_know(tmp_path, tokenizer_dir):
    raw = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\w+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"no word for how .*tokenizer\.json parts a text"):
        write(tmp_path / "m.gguf", small("Llama-2-7b-hf", vocab_size=320), tokenizer_dir=tmp_path)


def test_more_ids_than_rows(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="300 ids, the model 96 rows"):
        write(tmp_path / "m.gguf", small("Llama-2-7b-hf"), tokenizer_dir=tokenizer_dir)

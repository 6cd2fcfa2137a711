import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gristmill.config.commands import TokenizerTrain
from gristmill.tokenizer import train
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.tokenizer.train import train_bpe
from gristmill.util.errors import UserError

FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer_training.json"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config(out_dir, **options):
    return TokenizerTrain(out_dir=str(out_dir), **({"vocab_size": 600} | options))


def test_what_is_written(texts, tmp_path):
    trained = train_bpe(texts, config(tmp_path / "tok"))
    assert sorted(contents(tmp_path / "tok")) == FILES
    assert os.listdir(tmp_path) == ["tok"]
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert trained.vocab_size == tokenizer.num_token_ids == 600
    assert trained.num_bytes == sum(len(text.encode()) for text in texts)
    assert trained.bytes_per_token > 1.5
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_token) == (None, 0, "<|endoftext|>")
    assert not tokenizer.adds_bos


def test_special_tokens_come_first_in_their_order(trained):
    assert trained.special_tokens == ("<|bos|>", "<|endoftext|>", "<|user|>")
    assert [trained.backend.token_id(t) for t in trained.special_tokens] == [0, 1, 2]


def test_digits_go_in_threes_and_words_keep_their_space(trained):
    words = [trained.decode([i]) for i in trained.encode("12345")]
    assert "".join(words) == "12345"
    assert not any("34" in word for word in words)
    assert trained.decode(trained.encode("the def return")[-1:]) == " return"


def test_transformers_loads_it_as_it_is(trained, trained_dir):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained_dir)
    assert (theirs.bos_token, theirs.eos_token) == ("<|bos|>", "<|endoftext|>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert set(theirs.all_special_tokens) == {"<|bos|>", "<|endoftext|>", "<|user|>"}
    for text in ["def f(x):\n    return 12345", "Größe 你好 🙂", "  a <|user|> b"]:
        assert theirs(text)["input_ids"] == trained.encode(text, bos=True, special=True)
        assert theirs.decode(trained.encode(text)) == text


def test_without_bos_transformers_adds_nothing(texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    train_bpe(texts[:3], config(tmp_path / "tok"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert theirs("a word")["input_ids"] == Tokenizer.load(tmp_path / "tok").encode("a word")
    assert theirs.bos_token is None


SCRIPT = """
import sys
from pathlib import Path
from gristmill.config.commands import TokenizerTrain
from gristmill.tokenizer.train import train_bpe
texts = [p.read_text("utf-8") for p in sorted(Path(sys.argv[1]).rglob("*.py"))]
train_bpe(texts, TokenizerTrain(out_dir=sys.argv[2], vocab_size=1500))
"""


def test_the_same_text_gives_the_same_bytes_on_any_number_of_threads(tmp_path):
    source = Path(train.__file__).parent
    for name, environment in {
        "one": {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
        "four": {"RAYON_NUM_THREADS": "4", "PYTHONHASHSEED": "2", "TOKENIZERS_PARALLELISM": "1"},
    }.items():
        command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / name)]
        subprocess.run(command, check=True, env=os.environ | environment)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")
    assert Tokenizer.load(tmp_path / "one").num_token_ids == 1500


def test_a_rerun_leaves_the_files_alone(texts, tmp_path, monkeypatch):
    first = train_bpe(texts, config(tmp_path / "tok"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tok").iterdir()}
    monkeypatch.setattr(train, "_new_tokenizer", None)  # training again would fail
    again = train_bpe(texts, config(tmp_path / "tok"))
    assert (first.is_new, again.is_new) == (True, False)
    assert again.vocab_size == first.vocab_size
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tok").iterdir()} == before


def test_another_tokenizer_is_not_replaced_unasked(texts, tmp_path):
    train_bpe(texts, config(tmp_path))
    before = contents(tmp_path)
    for changed in (
        lambda: train_bpe(texts, config(tmp_path, vocab_size=700)),
        lambda: train_bpe(texts[1:], config(tmp_path)),
        lambda: train_bpe(texts, config(tmp_path, eos_token="</s>")),
    ):
        with pytest.raises(UserError, match=r"another tokenizer.*--overwrite true"):
            changed()
    assert contents(tmp_path) == before
    train_bpe(texts, config(tmp_path, vocab_size=700, overwrite=True))
    assert Tokenizer.load(tmp_path).num_token_ids == 700


def test_a_foreign_tokenizer_is_not_replaced_unasked(texts, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="another tokenizer"):
        train_bpe(texts, config(tmp_path))
    train_bpe(texts, config(tmp_path, overwrite=True))
    assert sorted(contents(tmp_path)) == FILES


def test_a_kill_while_replacing_leaves_no_mixture(texts, tmp_path, monkeypatch):
    train_bpe(texts, config(tmp_path / "tok"))

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train_bpe(texts, config(tmp_path / "tok", vocab_size=700, overwrite=True))
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "tok")
    train_bpe(texts, config(tmp_path / "tok", vocab_size=700))
    assert Tokenizer.load(tmp_path / "tok").num_token_ids == 700


def test_a_failure_leaves_nothing(tmp_path):
    def documents():
        yield "some text"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        train_bpe(documents(), config(tmp_path / "tok"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256}, r"vocab_size 256 has no room.*--vocab_size 257"),
        ({"vocab_size": 258, "special_tokens": ["<|a|>", "<|b|>"]}, "at least --vocab_size 259"),
        ({"eos_token": ""}, "special token is empty"),
        ({"special_tokens": ["end"]}, "'end' looks like an ordinary word"),
        ({"out_dir": None}, "add --out_dir"),
    ],
)
def test_impossible_settings(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train_bpe(["text"], TokenizerTrain(**({"out_dir": str(tmp_path / "tok")} | options)))
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_text(tmp_path, documents):
    with pytest.raises(UserError, match="there is no text"):
        train_bpe(documents, config(tmp_path / "tok"))
    assert os.listdir(tmp_path) == []


def test_out_dir_is_a_file(tmp_path):
    (tmp_path / "tok").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train_bpe(["text"], config(tmp_path / "tok"))


def test_a_small_text_gives_fewer_tokens(tmp_path):
    trained = train_bpe(["ab ab ab"], config(tmp_path / "tok"))
    assert 257 < trained.vocab_size < 300
    assert Tokenizer.load(tmp_path / "tok").decode([256]) != ""


def test_the_least_vocabulary_has_all_bytes(tmp_path):
    train_bpe(["abc"], config(tmp_path / "tok", vocab_size=257))
    tokenizer = Tokenizer.load(tmp_path / "tok")
    text = "any text: \x00 ÿ 中 🙂"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_share_comes_from_all_over_the_text():
    blocks = [f"{i:04d}" * 25 for i in range(1000)]
    taken = [int(block[:4]) for block in train._evenly(blocks, 0.1)]
    assert len(taken) == 100
    assert max(b - a for a, b in zip([0, *taken], [*taken, 1000])) <= 10
    assert list(train._evenly(blocks, 1.0)) == blocks


def test_a_share_is_never_exceeded():
    blocks = ["x" * (1 + (i * 7919) % 1000) for i in range(500)]
    total = sum(map(len, blocks))
    for share in (0.01, 0.3, 0.999):
        taken = sum(map(len, train._evenly(blocks, share)))
        assert share * total - 1000 <= taken <= share * total


def test_blocks_are_the_text():
    documents = ["short", "", "line\n" * 20_000, "x" * 50_000]
    blocks = list(train._blocks(documents))
    assert "".join(blocks) == "".join(documents)
    assert max(map(len, blocks)) <= 16_384


def test_record_has_no_paths_or_times(trained_dir):
    record = json.loads((trained_dir / "tokenizer_training.json").read_text())
    assert set(record) == {
        *("algorithm", "split", "vocab_size_asked", "special_tokens", "bos_token", "eos_token"),
        *("share", "text", "vocab_size", "num_bytes", "bytes_per_token"),
    }

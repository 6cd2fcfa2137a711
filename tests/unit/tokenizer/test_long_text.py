import json
import subprocess
import sys

import numpy as np
import pytest

from gristmill.tokenizer import long_text
from gristmill.tokenizer.huggingface import spans_line
from gristmill.tokenizer.long_text import encode_bounded
from gristmill.tokenizer.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(long_text, "MAX_CALL_BYTES", 2_000)
    monkeypatch.setattr(long_text, "MAX_TEXT_BYTES", 4_000)


def test_long_documents_encode_as_whole_ones(any_tokenizer, texts):
    long = "\n".join(texts)[:60_000]
    for text in (long, long.replace("\n", "\r\n"), "中文\n" * 3_000, "x" * 20_000, "\n" * 9_000):
        ids, offsets = any_tokenizer.encode_batch(["a", text, "", "b"])
        assert ids[offsets[1] : offsets[2]].tolist() == any_tokenizer.encode(text)
        assert offsets[3] == offsets[2]
        assert ids[offsets[3] :].tolist() == any_tokenizer.encode("b")


def test_byte_level_tokenizers_are_cut(trained, texts):
    for text in ("\n".join(texts), "Some words of prose,\nin lines.\n" * 2_000):
        pieces = trained.long_text.pieces(text)
        assert len(pieces) > 10
        assert "".join(pieces) == text
        assert all(piece.endswith("\n") for piece in pieces[:-1])
        assert all(piece[0].isalpha() for piece in pieces[1:])
    assert max(map(len, pieces)) < 2_050


def test_sentencepiece_is_not_cut(stories_dir):
    text = "a line of text\n" * 1_000
    assert Tokenizer.load(stories_dir).long_text.pieces(text) == [text]


def test_short_texts_are_not_cut(trained):
    text = "a\nb" * 1_000
    assert trained.long_text.pieces(text) == [text]


def changed(trained_dir, tmp_path, change):
    content = json.loads((trained_dir / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(tmp_path)


def test_a_normalizer_that_marks_beginnings_forbids_cuts(trained_dir, tmp_path):
    def change(content):
        content["normalizer"] = {"type": "Prepend", "prepend": "_"}

    tokenizer = changed(trained_dir, tmp_path, change)
    text = "some words\n" * 1_000
    assert tokenizer.long_text.pieces(text) == [text]
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_an_added_token_over_a_line_break_forbids_cuts(trained_dir, tmp_path):
    def change(content):
        token = dict(content["added_tokens"][0])
        token.update(id=2000, content="end\nbegin", special=False)
        content["added_tokens"].append(token)

    tokenizer = changed(trained_dir, tmp_path, change)
    text = "begin the end\n" * 1_000
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert 2000 in tokenizer.encode(text)


@pytest.mark.parametrize(
    ("token", "spans"),
    [("abc", False), ("ĊĊ", False), (";Ċ", False), ("ĊĠĠ", False), ("ĊÂł", False), ("Ċa", True),
     ("ĊĊz", True), ("Ċä¸Ń", True), ("Ċä¸", True), ("\n", False), ("\nb", True), ("x\n\n", False)],
)  # fmt: skip
def test_vocabulary_entries_with_a_newline_before_a_letter(token, spans):
    assert spans_line(token) is spans


def test_calls_are_bounded(trained):
    calls = []

    def encode(texts):
        calls.append(sum(map(len, texts)))
        return np.zeros(len(texts), np.uint32), np.arange(len(texts) + 1)

    texts = ["word " * 100 + "x\nletter " * 10] * 50
    ids, offsets = encode_bounded(texts, encode, trained.long_text)
    assert max(calls) <= 2_000
    assert sum(calls) == sum(map(len, texts))
    assert offsets.tolist() == list(range(51))
    assert len(ids) == 50


MEASURE = """
import resource, sys
from gristmill.tokenizer.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
text = "Some words of prose in a line, " * 3 + "\\nwith another one\\n"
text = (text * 100_000)[: 8_000_000]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids, _ = tokenizer.encode_batch([text])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / len(text))
"""


@pytest.mark.slow
def test_memory_for_a_long_document_is_bounded(trained_dir):
    command = [sys.executable, "-c", MEASURE, str(trained_dir)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Ids are 4 bytes each; whole, the library takes more than 100 bytes per byte of text.
    assert float(told) < 30

import io
import json
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gristmill.tokenizer import long_text
from gristmill.tokenizer.long_text import TooLong, encode_bounded, reaches_over
from gristmill.tokenizer.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(long_text, "MAX_CALL_BYTES", 2_000)
    monkeypatch.setattr(long_text, "MAX_TEXT_BYTES", 4_000)
    monkeypatch.setattr(long_text, "MAX_UNCUT_BYTES", 12_000)


def test_long_documents_encode_as_whole_ones(any_tokenizer, texts):
    long = "\n".join(texts)[:60_000]
    for text in (long, long.replace("\n", "\r\n"), "中文\n" * 3_000, "x" * 20_000, "\n" * 9_000):
        ids, offsets = any_tokenizer.encode_batch(["a", text, "", "b"])
        assert ids[offsets[1] : offsets[2]].tolist() == any_tokenizer.encode(text)
        assert offsets[3] == offsets[2]
        assert ids[offsets[3] :].tolist() == any_tokenizer.encode("b")


def test_byte_level_tokenizers_are_cut(trained, texts):
    for text in ("\n".join(texts), "Some words of prose,\nin lines.\n" * 2_000):
        pieces = trained.cutter.pieces(text)
        assert len(pieces) > 10
        assert "".join(pieces) == text
        assert all(one.endswith("\n") == two[0].isalpha() for one, two in pairwise(pieces))
        assert all(piece.lstrip(" ")[0].isalpha() for piece in pieces[1:])
    assert max(map(len, pieces)) < 2_050
    assert all(piece.endswith("\n") for piece in pieces)


def streamed(tokenizer, text, piece):
    """Pieces of a text that comes in pieces of `piece` characters."""
    parts = (text[at : at + piece] for at in range(0, len(text), piece))
    return list(tokenizer.cutter.streamed(parts))


@pytest.mark.parametrize("piece", [700, 5_000, 10**6])
def test_a_text_that_comes_in_pieces_has_the_same_ids(any_tokenizer, texts, piece):
    for text in ("\n".join(texts)[:40_000], "no lines but words " * 3_000, "short", ""):
        ids = [
            i for part in streamed(any_tokenizer, text, piece) for i in any_tokenizer.encode(part)
        ]
        assert ids == any_tokenizer.encode(text)


def test_memory_for_a_text_in_pieces_is_bounded(any_tokenizer):
    text = "Words without a line, " * 20_000
    found = streamed(any_tokenizer, text, 3_000)
    assert len(found) > 100
    assert max(map(len, found)) < 3_000


def test_a_stretch_without_a_place_to_cut_is_refused(any_tokenizer):
    assert any_tokenizer.cutter.fits("x" * 12_000)
    assert not any_tokenizer.cutter.fits("x" * 12_001)
    assert not any_tokenizer.cutter.fits("some words " * 2_000 + "é" * 6_100)
    assert any_tokenizer.cutter.fits("some words " * 2_000)
    with pytest.raises(TooLong):
        streamed(any_tokenizer, "some words " * 2_000 + "x" * 20_000, 3_000)


def sentencepiece_model(folder, texts, **options):
    written = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:3_000]),
        model_writer=written,
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},  # Llama 2
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},  # Gemma
        {"normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_merging_sentencepiece_models_are_cut_at_words(tmp_path, texts, options):
    tokenizer = sentencepiece_model(tmp_path, texts, model_type="bpe", **options)
    text = "\n".join(texts)[:60_000] + " x  y   z\t 1 \u3000é" * 500
    pieces = tokenizer.cutter.pieces(text)
    assert len(pieces) > 5
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},  # the best way through a text depends on all of it
        {"model_type": "bpe", "split_by_whitespace": False},  # pieces of several words
        {"model_type": "bpe", "treat_whitespace_as_suffix": True},
    ],
)
def test_other_sentencepiece_models_are_not_cut(tmp_path, texts, options):
    tokenizer = sentencepiece_model(tmp_path, texts, **options)
    text = "a line of text\n" * 1_000
    assert tokenizer.cutter.pieces(text) == [text]
    assert not tokenizer.cutter.fits(text)


def merging(folder, texts, *, prefix):
    """A tokenizer.json as those of Llama 2 (with prefix) and Gemma: merges over the whole text."""
    library = Library(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    library.decoder = decoders.Replace("\u2581", " ")
    trained = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["\u2581"],
        show_progress=False,
    )
    library.train_from_iterator(texts, trained)
    library.pre_tokenizer = None
    if prefix:
        library.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("prefix", [True, False])
def test_merging_tokenizers_without_pre_tokenizer_are_cut(tmp_path, texts, prefix):
    tokenizer = merging(tmp_path, texts, prefix=prefix)
    chosen = random.Random(0)
    alphabet = "ab  .1é中\n"
    noise = "".join(chosen.choice(alphabet) for _ in range(30_000))
    for text in ("\n".join(texts)[:40_000], noise):
        pieces = tokenizer.cutter.pieces(text)
        assert len(pieces) > 8
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
        assert [
            i for piece in streamed(tokenizer, text, 900) for i in tokenizer.encode(piece)
        ] == tokenizer.encode(text)


def test_a_token_over_two_words_forbids_cuts(tmp_path, texts):
    tokenizer = merging(tmp_path, texts, prefix=False)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    assert "\u2581" in vocabulary
    vocabulary["s\u2581"] = max(vocabulary.values()) + 1
    merges.insert(0, ["s", "\u2581"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    text = "words words words " * 1_000
    assert vocabulary["s\u2581"] in tokenizer.encode(text)
    assert tokenizer.cutter.pieces(text) == [text]


def test_short_texts_are_not_cut(trained):
    text = "a\nb" * 1_000
    assert trained.cutter.pieces(text) == [text]


def changed(trained_dir, tmp_path, change):
    content = json.loads((trained_dir / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(tmp_path)


def test_a_normalizer_that_marks_beginnings_forbids_cuts(trained_dir, tmp_path):
    def change(content):
        content["normalizer"] = {"type": "Prepend", "prepend": "_"}

    tokenizer = changed(trained_dir, tmp_path, change)
    text = "somewords\n" * 1_000  # after a line the mark would be there twice
    assert tokenizer.cutter.pieces(text) == [text]
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
    assert reaches_over(token, "\n") is spans


@pytest.mark.parametrize(
    ("token", "spans"),
    [("abc", False), ("Ġabc", False), ("ĠĠĠ", False), ("aĠ", True), ("aĠb", True), ("ĊĠĠ", False),
     ("\u2581a", False), ("\u2581\u2581", False), ("a\u2581", True), (",\u2581the", True),
     ("a b", True), ("  ", False)],
)  # fmt: skip
def test_vocabulary_entries_with_a_space_inside(token, spans):
    assert reaches_over(token, " ") is spans


def test_calls_are_bounded(trained):
    calls = []

    def encode(texts):
        calls.append(sum(map(len, texts)))
        return np.zeros(len(texts), np.uint32), np.arange(len(texts) + 1)

    texts = ["word " * 100 + "x\nletter " * 10] * 50
    ids, offsets = encode_bounded(texts, encode, trained.cutter)
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

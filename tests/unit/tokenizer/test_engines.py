import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from gristmill.tokenizer import engines, parity
from gristmill.tokenizer.engines import EngineChoice, choose_engine, open_engine, single_thread_env
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

pytest.importorskip("fastokens")


class Wrong(engines._Fastokens):
    """An engine that is right except where a text holds a certain word."""

    word = "\u200d"

    def encode_batch(self, texts):
        ids, offsets = super().encode_batch(texts)
        ids = ids.copy()
        for i, text in enumerate(texts):
            if self.word in text:
                ids[offsets[i + 1] - 1] += 1
        return ids, offsets


def wrong_about(monkeypatch, word):
    monkeypatch.setattr(Wrong, "word", word)
    monkeypatch.setattr(engines, "_Fastokens", Wrong)


@pytest.fixture
def counted(monkeypatch):
    """How many texts each comparison took."""
    counts = []
    real = parity.difference

    def difference(definition, engine, texts):
        counts.append(len(texts))
        return real(definition, engine, texts)

    monkeypatch.setattr(parity, "difference", difference)
    return counts


def test_fast_engine_passes_and_encodes_the_same(any_tokenizer, texts):
    choice = choose_engine(any_tokenizer, "auto", texts)
    expected = "fastokens" if any_tokenizer.kind == "tokenizers" else "sentencepiece"
    assert choice.name == expected
    engine = open_engine(any_tokenizer, choice)
    job = [*texts, *parity.awkward_texts(any_tokenizer.special_tokens), "a\ud800b"]
    ids, offsets = engine.encode_batch(job)
    right_ids, right_offsets = any_tokenizer.encode_batch(job)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert np.array_equal(ids, right_ids)
    assert np.array_equal(offsets, right_offsets)
    ids, offsets = engine.encode_batch([])
    assert (len(ids), offsets.tolist()) == (0, [0])


def test_the_definition_can_be_asked_for(trained):
    choice = choose_engine(trained, "tokenizers", ["x"])
    assert (choice.name, choice.parity) == ("tokenizers", "definition")
    assert open_engine(trained, choice) is trained


def test_an_engine_wrong_on_awkward_text_is_not_taken(trained, monkeypatch):
    wrong_about(monkeypatch, "\u200d")
    choice = choose_engine(trained, "auto", [])
    assert (choice.name, choice.parity) == ("tokenizers", "definition")
    assert "encodes differently" in choice.note
    with pytest.raises(UserError, match=r"encodes differently.*--engine tokenizers"):
        choose_engine(trained, "fastokens", [])


def test_an_engine_wrong_on_the_jobs_own_text_is_not_taken(trained, monkeypatch):
    wrong_about(monkeypatch, "quux")
    assert choose_engine(trained, "auto", ["fine"]).name == "fastokens"
    assert choose_engine(trained, "auto", ["fine", "the quux"]).name == "tokenizers"
    # and that is remembered
    assert choose_engine(trained, "auto", ["fine"]).name == "tokenizers"


def test_one_wrong_offset_is_found(trained):
    class Shifted:
        def encode_batch(self, texts):
            ids, offsets = trained.encode_batch(texts)
            offsets[1] += 1
            return ids, offsets

    assert parity.difference(trained, trained, ["ab", "cd"]) == ""
    assert "differs at token" in parity.difference(trained, Shifted(), ["ab", "cd"])


def test_a_verdict_is_remembered_and_new_text_compared(trained, counted):
    choose_engine(trained, "auto", ["one text"])
    assert len(counted) == 2  # awkward texts, the job's
    choose_engine(trained, "auto", ["one text"])
    assert len(counted) == 2
    choose_engine(trained, "auto", ["another text"])
    assert counted[2:] == [1]


def test_at_most_a_megabyte_is_compared(trained, counted):
    choose_engine(trained, "auto", ("word " * 20_000 for _ in range(1000)))
    assert counted[1] == 10


def test_a_verdict_of_another_definition_does_not_count(trained, counted):
    choose_engine(trained, "auto", [])
    path = engines._verdict_path(trained)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"definition": "tokenizers 0.0.1"}))
    choose_engine(trained, "auto", [])
    path.write_text("{broken")
    choose_engine(trained, "auto", [])
    assert len(counted) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_cache_that_cannot_be_written(trained, tmp_path, monkeypatch):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert choose_engine(trained, "auto", ["x"]).name == "fastokens"
    tmp_path.chmod(stat.S_IRWXU)


def test_a_cache_that_is_a_file(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose_engine(trained, "auto", ["x"]).name == "fastokens"


def test_engine_not_installed(trained, monkeypatch):
    versions = {"tokenizers": "1.0"}
    monkeypatch.setattr(engines, "_version", versions.get)
    assert choose_engine(trained, "auto", []).name == "tokenizers"
    with pytest.raises(UserError, match=r"not installed.*pip install"):
        choose_engine(trained, "fastokens", [])


def test_engine_that_cannot_read_the_tokenizer(trained, monkeypatch):
    def fail(tokenizer):
        raise ValueError("unsupported pre-tokenizer")

    monkeypatch.setattr(engines, "_Fastokens", fail)
    assert "unsupported pre-tokenizer" in choose_engine(trained, "auto", []).note
    with pytest.raises(UserError, match="unsupported pre-tokenizer"):
        choose_engine(trained, "fastokens", [])


def test_sentencepiece_has_no_faster_engine(stories_dir):
    tokenizer = Tokenizer.load(stories_dir)
    assert choose_engine(tokenizer, "auto", []).parity == "definition"
    assert choose_engine(tokenizer, "tokenizers", []).name == "sentencepiece"
    with pytest.raises(UserError, match="SentencePiece"):
        choose_engine(tokenizer, "fastokens", [])


def test_another_version_than_planned_is_refused(trained):
    with pytest.raises(UserError, match=r"planned with fastokens 0\.0\.1.*fastokens==0\.0\.1"):
        open_engine(trained, EngineChoice("fastokens", "0.0.1", "passed"))


def test_a_document_in_ten_thousand_is_rechecked():
    batches = [[f"document {i} {n}" for n in range(20)] for i in range(5000)]
    chosen = [engines._rechecked(batch) for batch in batches]
    assert 1 <= sum(map(len, chosen)) <= 40
    assert chosen == [engines._rechecked(batch) for batch in batches]
    picked = [engines._rechecked([f"first {i}", *["same"] * 10_000])[0] for i in range(50)]
    assert len(set(picked)) > 10
    assert engines._rechecked([]) == ()


def test_a_difference_while_running_fails_the_unit_and_is_remembered(trained, monkeypatch):
    wrong_about(monkeypatch, "quux")
    choice = choose_engine(trained, "auto", ["fine"])
    engine = open_engine(trained, choice)
    monkeypatch.setattr(engines, "_RECHECK_ONE_IN", 1)
    engine.encode_batch(["fine"])
    with pytest.raises(RunError, match=r"'the quux' differs at token.*--engine tokenizers"):
        engine.encode_batch(["the quux"])
    assert choose_engine(trained, "auto", ["fine"]).name == "tokenizers"


def test_encoding_takes_one_thread(trained):
    assert single_thread_env()["RAYON_NUM_THREADS"] == "1"
    code = "import json, os; from gristmill.tokenizer.tokenizer import Tokenizer; "
    code += "from gristmill.tokenizer.engines import *; import sys; "
    code += "t = Tokenizer.load(sys.argv[1]); e = open_engine(t, choose_engine(t, 'auto', ['x'])); "
    code += "e.encode_batch(['some words ' * 5000] * 50); print(len(os.listdir('/proc/self/task')))"
    out = subprocess.run(
        [sys.executable, "-c", code, str(trained.path)],
        env={**os.environ, **single_thread_env(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    # One for the caller, one that the library's pool keeps.
    assert int(out.stdout) <= 2

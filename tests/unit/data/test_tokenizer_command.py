import gzip
import json

import pytest

from gristmill.config.commands import TokenizerTrain
from gristmill.data.tokenizer_command import main
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

LINES = "".join(f"The {i}th line of words, with some more words in it.\n" for i in range(3000))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name}\n{LINES}")
    (folder / "bad.txt").write_bytes(b"\xff\xfe broken")
    return folder


def config(corpus, **options):
    settings = {"out_dir": str(corpus.parent / "tok"), "vocab_size": 400}
    return TokenizerTrain(input_dir=str(corpus), **(settings | options))


def test_report(corpus, capsys):
    main(config(corpus))
    told = capsys.readouterr().out
    num_bytes = 3 * len(LINES) + 6
    assert f"Read {num_bytes:,} bytes of text from 4 files." in told
    assert "Left out 1 document: 1 not UTF-8." in told
    assert "Trained 400 tokens" in told
    assert "bytes per token" in told
    assert f"Next: gristmill prepare textfiles --input_dir {corpus}" in told
    assert Tokenizer.load(corpus.parent / "tok").num_token_ids == 400


def test_rerun_says_already_done(corpus, capsys):
    main(config(corpus))
    before = (corpus.parent / "tok/tokenizer.json").stat().st_mtime_ns
    capsys.readouterr()
    main(config(corpus))
    assert "Already done" in capsys.readouterr().out
    assert (corpus.parent / "tok/tokenizer.json").stat().st_mtime_ns == before


def test_max_bytes_samples_the_text(corpus, capsys):
    main(config(corpus, max_bytes=100_000))
    record = json.loads((corpus.parent / "tok/tokenizer_training.json").read_text())
    assert 60_000 < record["num_bytes"] <= 100_000


def test_compressed_records(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"body": LINES}) + "\n" for _ in range(3)))
    main(config(folder, layout="jsonl", text_field="body"))
    whole = 3 * len(LINES)
    assert f"Read {whole:,} bytes" in capsys.readouterr().out
    main(config(folder, layout="jsonl", text_field="body", max_bytes=whole // 2, overwrite=True))
    record = json.loads((tmp_path / "tok/tokenizer_training.json").read_text())
    assert whole // 2 - 20_000 < record["num_bytes"] <= whole // 2


def test_a_small_text_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("few words")
    main(config(tmp_path / "a.txt", vocab_size=5000))
    assert "too small for 5,000 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dir": None}, "add --input_dir"),
        ({"input_dir": "absent"}, "absent"),
        ({"out_dir": None}, "add --out_dir"),
        ({"vocab_size": 100}, "has no room"),
        ({"layout": "nope"}, "nope"),
        ({"pattern": "*.md"}, r"\*\.md"),
        ({"pattern": "bad.txt"}, "not UTF-8"),
        ({"max_bytes": 0}, "max_bytes 0"),
    ],
)
def test_mistakes(corpus, options, message):
    cfg = config(corpus)
    for name, value in options.items():
        setattr(cfg, name, value)
    with pytest.raises(UserError, match=message):
        main(cfg)
    assert not (corpus.parent / "tok").exists()

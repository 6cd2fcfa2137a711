"""What `data estimate` says is what preparing gives, within the error that it names."""

import json
import random
from pathlib import Path

import pytest

from gristmill.config.data_commands import DataEstimate
from gristmill.data.look import estimate, pieces
from gristmill.data.storage import Storage
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

from .conftest import make_text


def estimated(capsys, layout, source, tokenizer_dir, **options):
    settings = {"tokenizer_dir": str(tokenizer_dir), "engine": "tokenizers", "json": True}
    estimate.run(DataEstimate(layout=layout, input_dir=str(source), **settings | options))
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def corpus(tmp_path):
    """2,000 records in two files, about 500 kB, some of them of another language."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    languages = random.Random(5)
    for file in range(2):
        lines = []
        for n in range(1000):
            text = make_text(n % 50, 10 + n % 80)
            lines.append(
                json.dumps({"text": text, "meta": {"lang": languages.choice(["en"] * 3 + ["fr"])}})
            )
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def little(monkeypatch):
    """Samples of a tenth of the corpus instead of tens of megabytes."""
    monkeypatch.setattr(estimate, "_LEAST_BYTES", 64_000)
    monkeypatch.setattr(estimate, "_SMALL_BYTES", 0)


def packed(corpus, suffix):
    """The same text, compressed or as parquet or text files."""
    out = corpus.parent / suffix
    out.mkdir()
    for path in sorted(corpus.iterdir()):
        data = path.read_bytes()
        if suffix == "gz":
            import gzip

            (out / f"{path.name}.gz").write_bytes(
                gzip.compress(data[:50_000]) + gzip.compress(data[50_000:])
            )
        elif suffix == "zst":
            import zstandard

            parts = (data[:50_000], data[50_000:])
            (out / f"{path.name}.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
        elif suffix == "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            rows = [json.loads(line) for line in data.splitlines()]
            parquet.write_table(
                pa.Table.from_pylist(rows), out / f"{path.stem}.parquet", row_group_size=40
            )
        else:
            texts = [json.loads(line)["text"] for line in data.splitlines()]
            (out / f"{path.stem}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return out


def test_all_of_a_small_input_is_read_and_exact(
    corpus, tokenizer_dir, run_prepare, tmp_path, capsys
):
    (found,) = estimated(capsys, "jsonl", corpus, tokenizer_dir)["estimates"]
    dataset = Dataset.open(run_prepare("jsonl", corpus, tmp_path / "out"))
    assert found["tokens_error"] == 0
    assert found["tokens"] == dataset.num_tokens
    assert found["documents"] == dataset.num_documents
    assert found["text_bytes"] == dataset.text_bytes


@pytest.mark.parametrize("form", ["jsonl", "gz", "zst", "parquet", "txt"])
def test_a_sample_tells_the_whole(
    form, corpus, little, tokenizer_dir, run_prepare, tmp_path, capsys
):
    source = corpus if form == "jsonl" else packed(corpus, form)
    layout = {"parquet": "parquet", "txt": "textfiles"}.get(form, "jsonl")
    (found,) = estimated(capsys, layout, source, tokenizer_dir)["estimates"]
    dataset = Dataset.open(run_prepare(layout, source, tmp_path / "out"))
    assert 0 < found["read_bytes"] < 0.6 * found["input_bytes"]
    assert found["tokens"] == pytest.approx(dataset.num_tokens, rel=0.15)
    assert found["documents"] == pytest.approx(dataset.num_documents, rel=0.2)
    assert found["text_bytes"] == pytest.approx(dataset.text_bytes, rel=0.15)
    off = abs(found["tokens"] - dataset.num_tokens) / dataset.num_tokens
    assert off < 3 * found["tokens_error"] + 0.02


def test_many_small_files_are_sampled_by_neighbours(
    little, tokenizer_dir, run_prepare, tmp_path, capsys
):
    source = tmp_path / "many"
    source.mkdir()
    for n in range(1200):
        (source / f"{n:04}.txt").write_text(make_text(n % 40, 30 + n % 50), encoding="utf-8")
    (found,) = estimated(capsys, "textfiles", source, tokenizer_dir)["estimates"]
    dataset = Dataset.open(run_prepare("textfiles", source, tmp_path / "out"))
    assert found["files"] == found["documents"] == dataset.num_documents == 1200
    assert found["tokens"] == pytest.approx(dataset.num_tokens, rel=0.15)


def test_filters_and_rejects_are_reckoned_too(corpus, little, tokenizer_dir, capsys):
    bad = json.dumps({"text": 5, "meta": {"lang": "en"}})
    for path in corpus.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line}\n{bad}\n" for line in lines), encoding="utf-8")
    found = estimated(capsys, "jsonl", corpus, tokenizer_dir, filter={"meta.lang": "en"})
    found = found["estimates"][0]
    assert found["filtered"] == pytest.approx(500, rel=0.35)
    assert found["rejects"] == {"field 'text' is not text": pytest.approx(2000, rel=0.35)}
    estimate.run(
        DataEstimate(layout="jsonl", input_dir=str(corpus), tokenizer_dir=str(tokenizer_dir))
    )
    assert "field 'text' is not text" in capsys.readouterr().out


def test_nothing_is_written(corpus, little, tokenizer_dir, tmp_path, capsys):
    before = sorted(path for path in tmp_path.rglob("*"))
    out = tmp_path / "not" / "there"
    found = estimated(capsys, "jsonl", corpus, tokenizer_dir, output_dir=str(out))
    assert found["free_bytes"] > 0
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_the_page_says_whether_there_is_room(corpus, tokenizer_dir, tmp_path, capsys, monkeypatch):
    cfg = DataEstimate(
        layout="jsonl",
        input_dir=str(corpus),
        tokenizer_dir=str(tokenizer_dir),
        output_dir=str(tmp_path / "out"),
    )
    estimate.run(cfg)
    page = capsys.readouterr().out
    assert "the numbers are exact" in page
    assert "room enough" in page
    monkeypatch.setattr(estimate, "_free", lambda _: 1000)
    estimate.run(cfg)
    assert "too little room: 1.00 kB are free" in capsys.readouterr().out


def test_a_damaged_file_is_named_and_left_out(corpus, little, tokenizer_dir, capsys):
    source = packed(corpus, "zst")
    whole = (source / "1.jsonl.zst").read_bytes()
    (source / "1.jsonl.zst").write_bytes(whole[: len(whole) // 3])
    (found,) = estimated(capsys, "jsonl", source, tokenizer_dir, fraction=0.5)["estimates"]
    assert found["damaged"] in (["1.jsonl.zst"], [])  # by where its pieces lie
    assert found["tokens"] > 0


def test_any_beginning_of_the_places_is_spread_over_all():
    numbers = pieces._spread_numbers(64)
    assert sorted(numbers) == list(range(64))
    assert sorted(numbers[:4]) == [0, 16, 32, 48]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_the_size_of_packed_text_is_exact_for_small_files(corpus, kind):
    source = packed(corpus, kind)
    path = sorted(source.iterdir())[0]
    with Storage(source).open(path.name) as file:
        taken, text = pieces._unpacked(file.read, gzipped=kind == "gz")
    assert taken == path.stat().st_size
    assert text == (corpus / Path(path.name).with_suffix("").name).stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "--fraction 0 is no share"),
        ({"max_bytes": 0}, "--max_bytes 0 reads nothing"),
        ({"input_dir": None}, "--input_dir is missing"),
        ({"layout": "jsnl"}, "jsnl"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    settings = {"layout": "jsonl", "input_dir": "x", "tokenizer_dir": "y"}
    with pytest.raises(UserError, match=message):
        estimate.run(DataEstimate(**settings | options))

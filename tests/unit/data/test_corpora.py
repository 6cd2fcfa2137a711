"""Every layout, on a corpus that lies on disk as the real one does: which texts, framed how."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gristmill.config.data import OpenWebText, TinyStories
from gristmill.data.modules import open_datasets
from gristmill.data.raw import layouts
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

from .conftest import make_text

BOS, EOS = 0, 1


def texts(start: int, count: int = 4) -> list[str]:
    return [make_text(number, 20 + number) for number in range(start, start + count)]


def lines(rows: Sequence[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(path: Path, content: bytes | pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        packed = path.suffix == ".zst"
        path.write_bytes(zstandard.ZstdCompressor().compress(content) if packed else content)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as sink:
            sink.write_table(content)
    else:
        pq.write_table(content, path)


def plain(root: Path) -> None:
    put(root / "a/1.txt", texts(0, 1)[0].encode())
    put(root / "2.txt", texts(1, 1)[0].encode())


def json_lines(root: Path) -> None:
    put(root / "a.jsonl", lines([{"text": text} for text in texts(0)]))
    put(root / "b.jsonl.zst", lines([{"text": text} for text in texts(4)]))


def arrays(root: Path) -> None:
    put(root / "a.json", json.dumps([{"text": text} for text in texts(0)]).encode())
    put(root / "b.json", lines([{"text": text} for text in texts(4)]))


def columns(root: Path) -> None:
    put(root / "a.parquet", pa.table({"id": range(4), "text": texts(0)}))
    put(root / "sample/10BT/b.parquet", pa.table({"text": texts(4), "url": ["x"] * 4}))


def saved(root: Path) -> None:
    put(root / "train/data-00000-of-00001.arrow", pa.table({"text": texts(0)}))
    put(root / "train/dataset_info.json", b"{}")
    put(root / "train/state.json", b"{}")
    put(root / "dataset_dict.json", b'{"splits": ["train"]}')


def slimpajama(root: Path) -> None:
    sets = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaBook", "RedPajamaGithub"]
    for start, split in ((0, "train"), (4, "validation")):
        rows = [
            {"text": text, "meta": {"redpajama_set_name": name}}
            for text, name in zip(texts(start), sets)
        ]
        put(root / split / "chunk1/example_train_0.jsonl.zst", lines(rows))


def starcoder(root: Path) -> None:
    put(root / "go/train-0.parquet", pa.table({"content": texts(0), "id": range(4)}))
    put(root / "python/train-0.parquet", pa.table({"content": texts(4), "id": range(4)}))


def stories(root: Path) -> None:
    for number in range(2):
        rows = [{"summary": "x", "story": text} for text in texts(4 * number)]
        put(root / f"data{number:02}.json", json.dumps(rows).encode())


CORPORA: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "textfiles": (plain, texts(0, 2)),
    "jsonl": (json_lines, texts(0, 8)),
    "json": (arrays, texts(0, 8)),
    "parquet": (columns, texts(0, 8)),
    "huggingface": (saved, texts(0)),
    "fineweb": (columns, texts(0, 8)),
    "slimpajama": (slimpajama, [texts(0, 8)[number] for number in (0, 2, 4, 6)]),
    "starcoder": (starcoder, texts(0, 8)),
    "openwebtext": (columns, texts(0, 8)),
    "tinystories": (stories, texts(0, 8)),
}


def framed(folder: Path, tokenizer_dir: Path) -> tuple[list[str], set[tuple[bool, bool]]]:
    """The texts of a dataset, sorted, and how they are framed: (BOS before, EOS after)."""
    tokenizer, dataset = Tokenizer.load(tokenizer_dir), Dataset.open(folder)
    found, frames = [], set()
    for number in range(len(dataset.chunks)):
        chunk = dataset.map(number)
        start = 0
        for end in chunk.ends.tolist():
            ids = chunk.tokens[start:end].tolist()
            frames.add((ids[0] == BOS, ids[-1] == EOS))
            found.append(tokenizer.decode([i for i in ids if i not in (BOS, EOS)]))
            start = end
    return sorted(found), frames


@pytest.mark.parametrize("layout", CORPORA)
def test_the_texts_of_a_corpus_come_out_framed(layout, tmp_path, run_prepare, tokenizer_dir):
    make, expected = CORPORA[layout]
    make(tmp_path / "raw")
    out = run_prepare(layout, tmp_path / "raw", tmp_path / "out")
    found, frames = framed(out, tokenizer_dir)
    assert found == sorted(expected)
    wanted = {"bos": (True, False), "eos": (False, True), "both": (True, True)}
    assert frames == {wanted[layouts.get(layout).first]}


def test_one_split_of_slimpajama(tmp_path, run_prepare, tokenizer_dir):
    slimpajama(tmp_path / "raw")
    out = run_prepare("slimpajama", tmp_path / "raw", tmp_path / "out", split="validation")
    assert framed(out, tokenizer_dir)[0] == sorted([texts(4)[0], texts(4)[2]])


@pytest.mark.parametrize("sample", [False, True])
def test_each_set_of_redpajama_becomes_a_dataset(
    sample, tmp_path, run_prepare, tokenizer_dir, capsys
):
    redpajama = layouts.get("redpajama")
    files = {
        "arxiv": "arxiv/arxiv_1.jsonl",
        "book": "book/book.jsonl",
        "c4": "c4/c4-train.00000-of-01024.jsonl",
        "common_crawl": "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
        "github": "github/filtered_1.sampled.jsonl",
        "stackexchange": "stackexchange/stackexchange.jsonl",
        "wikipedia": "wikipedia/wiki.jsonl",
    }
    if sample:
        files = {name: f"{name}.jsonl" for name in redpajama.sample_parts or {}}
    for number, name in enumerate(files.values()):
        put(tmp_path / "raw" / name, lines([{"text": text} for text in texts(number)]))
    out = run_prepare("redpajama", tmp_path / "raw", tmp_path / "out", sample=sample)
    following = [line for line in capsys.readouterr().out.splitlines() if "Next: " in line]
    mixed = f"--data RedPajama --data.data_path {out}"
    assert following == [f"Next: gristmill pretrain MODEL {mixed}"]
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(files)
    for number, name in enumerate(files):
        found, frames = framed(out / name, tokenizer_dir)
        assert found == sorted(texts(number))
        assert frames == {(True, False)}


def test_a_set_that_is_not_there_is_said(tmp_path, run_prepare, capsys):
    put(tmp_path / "raw/arxiv/arxiv_1.jsonl", lines([{"text": text} for text in texts(0)]))
    run_prepare("redpajama", tmp_path / "raw", tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert [line.split()[2] for line in said] == list(layouts.get("redpajama").parts or {})[1:]


def test_training_reads_a_corpus_and_says_how_to_fetch_it(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no data/openwebtext, .*gristmill download Skylion007/"):
        open_datasets(OpenWebText(), tokenizer_dir)
    stories(tmp_path / "data/tinystories")
    found = open_datasets(TinyStories(val_fraction=0.0), tokenizer_dir)
    assert framed(found.train, tokenizer_dir) == (sorted(texts(0, 8)), {(True, False)})

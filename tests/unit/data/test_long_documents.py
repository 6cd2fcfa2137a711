"""Documents larger than memory should hold, through the readers and units as they are."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from gristmill.data.preparation.plan import Recipe, make_plan
from gristmill.data.preparation.units import run_unit
from gristmill.data.raw import documents, inputs
from gristmill.data.raw.sources import read_span
from gristmill.tokenizer import long_text
from gristmill.tokenizer.tokenizer import Tokenizer

from .conftest import make_text

LONG = make_text(3, 20_000)
SHORT = [make_text(n, 50) for n in range(20)]


def prepared(source: Path, out: Path, tokenizer: Tokenizer, **options):
    root, found = inputs.root_of(source), inputs.list_inputs(source, "**/*")
    suffix = found[0].place.partition(".")[2]
    recipe = Recipe(
        layout="x",
        records="text" if suffix == "txt" else "records",
        tokenizer="t",
        num_token_ids=tokenizer.num_token_ids,
        bos_id=0,
        eos_id=1,
        dtype="uint16",
        chunk_tokens=2048,
        seed=1,
        **options,
    )
    plan = make_plan(recipe, root, found)
    records = []
    for unit in range(len(plan.units)):
        folder = out / str(unit)
        folder.mkdir(parents=True)
        records.append(run_unit(plan, unit, root, tokenizer, folder, lambda progress: None))
    return plan, records


def parquet(path: Path, texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def arrow(path: Path, texts: list[str]) -> None:
    import pyarrow

    table = pyarrow.table({"text": texts})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


WRITERS = {
    "one.jsonl": lambda path, texts: path.write_bytes(lines(texts)),
    "one.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts))),
    "one.jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(lines(texts))),
    "one.json": lambda path, texts: path.write_text(json.dumps([{"text": t} for t in texts])),
    "one.parquet": parquet,
    "one.arrow": arrow,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_long_documents_of_every_form(tmp_path, tokenizer_dir, monkeypatch, name, val_fraction):
    """The same tokens whether a document is long or not; only the shuffle may differ."""
    tokenizer = Tokenizer.load(tokenizer_dir)
    (tmp_path / "in").mkdir()
    WRITERS[name](tmp_path / "in" / name, [LONG])
    plan, whole = prepared(tmp_path / "in", tmp_path / "a", tokenizer, val_fraction=val_fraction)
    monkeypatch.setattr(documents, "LONG_BYTES", 10_000)
    monkeypatch.setattr(long_text, "MAX_TEXT_BYTES", 4_000)
    monkeypatch.setattr(long_text, "MAX_CALL_BYTES", 2_000)
    span = plan.units[0][0]
    root = inputs.root_of(tmp_path / "in")
    found = next(iter(read_span(plan.recipe.format, root, plan.inputs[0], span)))
    assert hasattr(found, "pieces")
    again, pieces = prepared(tmp_path / "in", tmp_path / "b", tokenizer, val_fraction=val_fraction)
    assert again.hash == plan.hash
    for before, after in zip(whole, pieces, strict=True):
        assert before.tokens == after.tokens
        assert [s.text_bytes for s in before.splits] == [s.text_bytes for s in after.splits]
        assert [s.documents for s in before.splits] == [s.documents for s in after.splits]
        if not val_fraction:
            assert before == after  # digests of the chunks too


def test_a_long_file_that_is_no_text_is_rejected_without_a_trace(
    tmp_path, tokenizer_dir, monkeypatch
):
    monkeypatch.setattr(documents, "LONG_BYTES", 10_000)
    (tmp_path / "in").mkdir()
    for number, text in enumerate(SHORT):
        (tmp_path / "in" / f"{number:02}.txt").write_text(text)
    tokenizer = Tokenizer.load(tokenizer_dir)
    _, (good,) = prepared(tmp_path / "in", tmp_path / "a", tokenizer)
    (tmp_path / "in" / "bad.txt").write_bytes(LONG.encode() + b"\xff" + LONG.encode())
    _, (record,) = prepared(tmp_path / "in", tmp_path / "b", tokenizer)
    assert record.rejects == {"not UTF-8": 1}
    assert record.splits == good.splits


MEASURE = """
import resource, sys
from pathlib import Path
from gristmill.data.raw import inputs
from gristmill.data.preparation.plan import Recipe, make_plan
from gristmill.data.preparation.units import run_unit
from gristmill.tokenizer.tokenizer import Tokenizer

source, out, tokenizer_dir, records = sys.argv[1:]
tokenizer = Tokenizer.load(tokenizer_dir)
recipe = Recipe(
    layout="x", records=records, tokenizer="t", num_token_ids=tokenizer.num_token_ids, bos_id=0,
    eos_id=1, dtype="uint16", chunk_tokens=2**20, seed=1,
)
root, found = inputs.root_of(source), inputs.list_inputs(source, "*")
plan = make_plan(recipe, root, found)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = text_bytes = documents = 0
for unit in range(len(plan.units)):
    folder = Path(out) / str(unit)
    folder.mkdir(parents=True)
    record = run_unit(plan, unit, root, tokenizer, folder, lambda progress: None)
    text_bytes += record.splits[0].text_bytes
    documents += record.documents
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(documents, text_bytes, (after - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one.txt", "one.jsonl.zst"])
def test_memory_for_a_long_document_is_bounded(tmp_path, tokenizer_dir, name):
    size = 80_000_000
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    piece = ("the same words once more, " * 40 + "\n") * 100
    body = piece if name == "one.txt" else json.dumps(piece)[1:-1]
    around = ("", "") if name == "one.txt" else ('{"text": "', '"}\n')
    text = around[0] + body * (size // len(piece)) + around[1]
    packed = zstandard.compress(text.encode()) if name.endswith(".zst") else text.encode()
    path.write_bytes(packed)
    records = "text" if name == "one.txt" else "records"
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "in"), str(tmp_path / "out")]
    told = subprocess.run(
        [*command, str(tokenizer_dir), records], check=True, capture_output=True, text=True
    ).stdout
    num_documents, text_bytes, memory = map(int, told.split())
    assert num_documents == 1
    assert text_bytes == size // len(piece) * len(piece)
    # Held whole, its bytes, text and ids alone would be three times as much.
    assert memory < 90_000_000

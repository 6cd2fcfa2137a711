"""Plans over inputs of these tests' own, of which only what is asked for is read."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from gristmill.data.preparation import plan, split
from gristmill.data.preparation.plan import Plan, Recipe, lay_out, make_plan, sample_texts
from gristmill.data.preparation.split import FEW_DOCUMENTS, VAL, Split
from gristmill.data.raw import sources
from gristmill.data.raw.documents import FILTERED, DataError, Input, Reject, Unreadable
from gristmill.data.storage import Storage
from gristmill.util.errors import UserError

from .conftest import make_text

WHOLE = Split(1, -1, 0)
NOWHERE = Storage("/nowhere")


def recipe(**options) -> Recipe:
    settings = {
        "layout": "jsonl",
        "records": "records",
        "tokenizer": "t",
        "num_token_ids": 400,
        "bos_id": 0,
        "eos_id": 1,
        "dtype": "uint16",
        "chunk_tokens": 2048,
        "seed": 1,
    }
    return Recipe(**settings | options)


def listing(*sizes: int, suffix: str = ".jsonl") -> list[Input]:
    names = [f"{number:04}{suffix}" for number in range(len(sizes))]
    return [Input(name, name, size, "v") for name, size in zip(names, sizes, strict=True)]


@pytest.fixture
def reading(monkeypatch):
    """Inputs as lists of documents; what was read of each."""
    files: dict[str, list] = {}
    read: list[str] = []

    def read_span(form, root, item, span, *, selection=None, check=True):
        for document in files[item.path]:
            read.append(item.path)
            if isinstance(document, Exception):
                raise document
            yield document

    monkeypatch.setattr(sources, "read_span", read_span)
    return files, read


@pytest.mark.parametrize("sizes", [(5_000_000,), (100,) * 50, (10, 4_000_000, 0, 700_000, 1)])
def test_every_byte_is_in_one_unit(monkeypatch, sizes):
    monkeypatch.setattr(plan, "_MIN_UNIT_BYTES", 50_000)
    made = lay_out(recipe(), listing(*sizes), WHOLE)
    at = [0] * len(sizes)
    order = []
    for unit in made.units:
        for span in unit:
            assert span.start == at[span.input]
            at[span.input] = span.stop
            order.append(span.input)
    assert at == [-1] * len(sizes)
    assert order == sorted(order)
    weights = [made.text_bytes(unit) for unit in range(len(made.units))]
    assert sum(weights) == sum(sizes)
    assert max(weights) < 150_000
    spans = [span for unit in made.units for span in unit]
    assert sum(map(made.span_bytes, spans)) == sum(sizes)


def test_parquet_is_parted_by_bytes_of_the_file_and_weighs_more():
    made = lay_out(recipe(), listing(3_000_000_000, suffix=".parquet"), WHOLE)
    assert len(made.units) == round(6_000_000_000 / (6_000_000_000 // 64))
    assert made.units[1][0].start == 3_000_000_000 // len(made.units)
    assert made.text_bytes(0) == pytest.approx(6_000_000_000 / len(made.units), rel=0.01)


def test_whole_texts_are_not_parted():
    found = listing(500_000_000, 10, suffix=".txt")
    made = lay_out(recipe(records="text"), found, WHOLE)
    assert [[span.stop for span in unit] for unit in made.units] == [[-1], [-1]]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_few_compressed_files_are_parted(tmp_path, reading, monkeypatch, pack):
    files, _ = reading
    lines = "".join(f'{{"text": "{make_text(n, 40)}"}}\n'.replace("\n ", " ") for n in range(3000))
    name = "0000.jsonl.gz" if pack is gzip.compress else "0000.jsonl.zst"
    (tmp_path / name).write_bytes(pack(lines.encode()))
    files[name] = ["text"]
    monkeypatch.setattr(plan, "_MIN_UNIT_BYTES", 100_000)
    item = Input(name, name, (tmp_path / name).stat().st_size)
    made = make_plan(recipe(), Storage(tmp_path), [item])
    ends = [span.stop for unit in made.units for span in unit]
    assert len(ends) == 4
    # By the text that is in it, of which the beginning is looked at.
    assert ends[1] == pytest.approx(len(lines.encode()) / 2, rel=0.1)


def test_many_compressed_files_are_not_parted():
    found = listing(*[100_000_000] * 16, suffix=".jsonl.zst")
    assert len(lay_out(recipe(), found, WHOLE).units) == 16
    few = lay_out(recipe(), found[:4], WHOLE)
    assert len(few.units) == 16
    arrays = lay_out(recipe(), listing(100_000_000, suffix=".json.zst"), WHOLE)
    assert len(arrays.units) == 1


def test_a_damaged_compressed_file_is_for_its_unit_to_report(tmp_path, reading):
    files, _ = reading
    files["0000.jsonl.zst"] = ["some text"]
    (tmp_path / "0000.jsonl.zst").write_bytes(b"no frame" * 200_000)
    found = listing(1_600_000, suffix=".jsonl.zst")
    assert len(make_plan(recipe(), Storage(tmp_path), found).units) == 4
    with pytest.raises(UserError, match=r"cannot read .*0000\.jsonl\.zst .*narrow the pattern"):
        make_plan(recipe(), NOWHERE, found)


def test_the_hash_names_what_is_prepared_and_the_job_what_is_read():
    found = listing(100, 200)
    made = lay_out(recipe(), found, WHOLE)
    moved = [replace(item, place=f"é/{item.place}", version="w") for item in found]
    same = lay_out(recipe(), moved, WHOLE)
    assert same.hash == made.hash
    assert same.job != made.job
    others = [
        lay_out(recipe(seed=2), found, WHOLE),
        lay_out(recipe(filters={"lang": "en"}), found, WHOLE),
        lay_out(recipe(), listing(100, 201), WHOLE),
        lay_out(recipe(), found[:1], WHOLE),
        lay_out(recipe(), found, Split(1, 5, 0)),
        lay_out(recipe(val_pattern="0001*"), found, WHOLE),
        lay_out(recipe(val_pattern="0000*"), found, WHOLE),
    ]
    assert len({made.hash, *(other.hash for other in others)}) == len(others) + 1


def test_a_plan_survives_json():
    found = [Input("café.jsonl", "cafe\u0301.jsonl", 900_000_000, "v"), *listing(5, 6)]
    options = {"filters": {"a.b": {"in": [1, "x", None]}}, "val_pattern": "0000*"}
    made = lay_out(recipe(**options), found, Split(3, 2**63, 4096))
    again = Plan.from_json(json.loads(json.dumps(made.to_json())))
    assert (again.recipe, again.inputs, again.split) == (made.recipe, made.inputs, made.split)
    assert list(again.units) == list(made.units)
    assert (again.hash, again.job, again.val_inputs) == (made.hash, made.job, frozenset({1}))


def test_units_are_a_sequence():
    made = lay_out(recipe(), listing(10, 900_000_000), WHOLE)
    assert len(made.units) > 10
    assert made.units[1:3] == [made.units[1], made.units[2]]
    with pytest.raises(IndexError):
        made.units[len(made.units)]


def test_a_very_large_plan_is_columns():
    made = lay_out(recipe(), listing(*[256 << 30] * 160), WHOLE)
    assert len(made.units) > 160_000
    text = json.dumps(made.to_json())
    assert len(text) < 60 * len(made.units)
    again = Plan.from_json(json.loads(text))
    assert again.units[160_001] == made.units[160_001]
    assert np.array_equal(again.units.spans, made.units.spans)


def test_of_many_inputs_a_few_are_sampled(reading):
    files, read = reading
    found = listing(*[50_000_000] * 320)
    files |= {item.path: [make_text(1, 200)] * 1000 for item in found}
    make_plan(recipe(), NOWHERE, found)
    assert set(read) == {item.path for item in found[::20]}
    assert len(read) < 2000


def test_the_sample_is_spread_and_bounded(reading):
    files, _ = reading
    found = listing(*[50_000_000] * 4)
    files |= {item.path: [f"{item.path} {make_text(1, 400_000)}", " "] for item in found}
    sample = sample_texts(recipe(), NOWHERE, found)
    assert [text[:10] for text in sample] == [item.path for item in found]
    assert sum(map(len, sample)) == 1_000_000


def test_bad_and_damaged_inputs_are_passed_over(reading):
    files, read = reading
    bad = Reject("0000.jsonl", 0, "bad JSON")
    files |= {"0000.jsonl": [bad] * 10**6, "0001.jsonl": ["one", DataError("torn"), "three"]}
    files |= {"0002.jsonl": [FILTERED, "two"]}
    assert sample_texts(recipe(), NOWHERE, listing(1, 1, 1)) == ["one", "two"]
    assert len(read) < 20_000


def test_nothing_readable_is_an_error(reading):
    files, _ = reading
    files["0000.jsonl"] = [Reject("0000.jsonl", 0, "no field 'text'", "fields: a")] * 10**6
    with pytest.raises(UserError, match=r"no field 'text'; fields: a"):
        make_plan(recipe(), NOWHERE, listing(1))
    files["0000.jsonl"] = [DataError("it is torn")]
    with pytest.raises(DataError, match="torn"):
        make_plan(recipe(), NOWHERE, listing(1))


def test_a_slice_to_try_is_one_unit(reading):
    files, read = reading
    found = listing(*[50_000_000] * 160)
    texts = [make_text(n, 5_000) for n in range(50)]
    files |= {item.path: texts for item in found}
    made = make_plan(recipe(fast_dev_run=True, val_fraction=0.1), NOWHERE, found)
    assert len(made.units) == 1
    assert list(made.inputs) == found[::10]
    assert made.split.block_bytes
    assert len(read) < 250
    assert made.hash != make_plan(recipe(), NOWHERE, found[::10]).hash


def test_a_slice_to_try_has_both_sides(reading):
    files, _ = reading
    found = listing(*[50_000_000] * 160)
    files |= {item.path: [make_text(1, 100)] for item in found}
    made = make_plan(recipe(fast_dev_run=True, val_pattern="0005*"), NOWHERE, found)
    assert [made.inputs[number].path for number in made.val_inputs] == ["0005.jsonl"]
    assert len(made.inputs) == 17
    assert list(made.inputs) == sorted(made.inputs, key=lambda item: item.path)


class Long:
    def __init__(self, pieces):
        self._pieces = pieces

    def pieces(self):
        for piece in self._pieces:
            if piece is None:
                raise Unreadable(Reject("0000.jsonl", 0, "bad JSON"))
            yield piece


def test_long_documents_are_sampled_and_split(reading):
    files, _ = reading
    text = make_text(1, 300_000)
    files["0000.jsonl"] = [Long([text[:1000], text[1000:]])]
    found = listing(len(text))
    assert sample_texts(recipe(), NOWHERE, found) == [text[:1_000_000]]
    made = make_plan(recipe(val_fraction=0.2), NOWHERE, found)
    held = [part for side, part in made.split.sides(text) if side == VAL]
    assert 0.1 < sum(map(len, held)) / len(text) < 0.3
    files["0000.jsonl"] = [Long([text[:1000], None]), "short"]
    assert "short" in sample_texts(recipe(), NOWHERE, found)


def test_much_text_is_split_without_reading_it_all(reading, monkeypatch):
    monkeypatch.setattr(split, "BLOCK_BYTES", 4096)
    files, read = reading
    text = make_text(1, 5_000)
    files["0000.jsonl"] = [f"{n} {text[n:]}" for n in range(FEW_DOCUMENTS)]
    made = make_plan(recipe(val_fraction=0.2), NOWHERE, listing(10**12))
    assert made.split.block_bytes == 0  # there will be many documents
    assert len(read) < FEW_DOCUMENTS


def test_the_users_function_comes_before_the_split(reading, tmp_path, monkeypatch):
    (tmp_path / "halve.py").write_text(
        "def halve(texts):\n    return [t[: len(t) // 2] if 'keep' in t else None for t in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    files, _ = reading
    text = "keep " + make_text(1, 3_000)
    files["0000.jsonl"] = [make_text(2, 3_000), text]
    found = listing(2 * len(text))
    made = make_plan(recipe(map="halve:halve", val_fraction=0.3), NOWHERE, found)
    assert {side for side, _ in made.split.sides(text[: len(text) // 2])} == {0, 1}


@pytest.mark.parametrize(("pattern", "which"), [("*.txt", "none"), ("**/*.jsonl", "all")])
def test_validation_files_are_some_of_the_files(reading, pattern, which):
    with pytest.raises(UserError, match=rf"matches {which} of the 3 input files \(the first is"):
        lay_out(recipe(val_pattern=pattern), listing(1, 2, 3), WHOLE)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"val_fraction": 1.0}, "no share"),
        ({"val_fraction": 0.1, "val_pattern": "x"}, "exclude each other"),
        ({"chunk_tokens": 10}, "out of range"),
        ({"separator": ""}, "--separator is empty"),
    ],
)
def test_recipes_that_cannot_be_prepared(options, match):
    with pytest.raises(UserError, match=match):
        recipe(**options)

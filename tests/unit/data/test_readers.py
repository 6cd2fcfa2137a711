"""What is odd inside a file, form by form: each costs one document, and says where and why."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.raw import documents, sources
from gristmill.data.raw.documents import (
    FILTERED,
    DataError,
    Format,
    Input,
    Reject,
    Span,
    Unreadable,
)
from gristmill.data.raw.inputs import list_inputs, root_of
from gristmill.data.raw.readers.long_json import LongJson, Outline, cut_point
from gristmill.data.raw.readers.reading import Reading
from gristmill.data.raw.select import Selection
from gristmill.data.storage import Storage
from gristmill.util.errors import RunError

TEXT = Format("text")
RECORDS = Format("records")


def read(path: Path, form: Format = RECORDS, filters: dict | None = None) -> list:
    (item,) = list_inputs(path, "*")
    selection = Selection.from_settings(filters) if filters else None
    found = sources.read_span(form, root_of(path), item, Span(0, 0, -1), selection=selection)
    return [d if isinstance(d, str | Reject) or d is FILTERED else plain(d) for d in found]


def plain(document) -> str | Reject:
    try:
        return "".join(document.pieces())
    except Unreadable as error:
        return error.reject


def reasons(found: list) -> list[str]:
    return [d.reason if isinstance(d, Reject) else d for d in found]


# Text files.


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\nline  ".encode())
    assert read(path, TEXT) == ["é\r\nline  "]
    path.write_bytes(b"")
    assert read(path, TEXT) == [""]
    path.write_bytes(b"abc\0def")
    assert read(path, TEXT) == [Reject("a.txt", 0, "binary", "holds NUL bytes")]
    path.write_bytes(b"ok \xff\xfe")
    (reject,) = read(path, TEXT)
    assert (reject.reason, reject.at) == ("not UTF-8", 3)


@pytest.mark.parametrize("longest", [3, 8, 100])
def test_parts_of_a_text_file_are_judged_one_by_one(tmp_path, monkeypatch, longest):
    monkeypatch.setattr(documents, "LONG_BYTES", longest)
    monkeypatch.setattr("gristmill.data.raw.readers.text._BLOCK_BYTES", 5)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé".encode() + b"\r\n\r\nto\0\r\nlast \xff one\r\n the end")
    first, empty, binary, broken, last = read(path, Format("text", separator="\r\n"))
    assert (first, empty, last) == ("é", "", " the end")
    assert (binary.reason, binary.at) == ("binary", 9)
    assert (broken.reason, broken.at) == ("not UTF-8", 19)


@given(
    text=st.text("ab-é", max_size=60),
    separator=st.sampled_from(["-", "--", "a-b", "é"]),
    longest=st.integers(1, 70),
    block=st.integers(1, 20),
)
def test_text_is_parted_as_split_does(tmp_path_factory, text, separator, longest, block):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONG_BYTES", longest)
        patch.setattr("gristmill.data.raw.readers.text._BLOCK_BYTES", block)
        assert read(path, Format("text", separator=separator)) == text.split(separator)
        assert read(path, TEXT) == [text]


# JSON.

BAD_RECORDS = [
    (b'{"text": "a"', "bad JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud83d"}', "bad JSON"),
    (b'{"text": "\\ud83d", "n": NaN}', "bad JSON"),
    (b"\0\0\0\0", "bad JSON"),
    (b'{"content": "a", "id": 1}', "no field 'text'"),
    (b'{"text": null}', "field 'text' is not text"),
    (b'{"text": 3}', "field 'text' is not text"),
    (b'{"text": ["a"]}', "field 'text' is not text"),
    (b'["text"]', "not an object"),
    (b'"text"', "not an object"),
    (b"3", "not an object"),
]


@pytest.mark.parametrize("longest", [1 << 24, 8])
@pytest.mark.parametrize("field", ["text", "text.in"])
@pytest.mark.parametrize(("line", "reason"), BAD_RECORDS)
def test_a_bad_line_costs_one_line(tmp_path, monkeypatch, line, reason, field, longest):
    monkeypatch.setattr(documents, "LONG_BYTES", longest)
    monkeypatch.setattr(
        "gristmill.data.raw.readers.jsonl._BLOCK_BYTES", 1 << 19 if longest > 8 else 5
    )
    path = tmp_path / "a.jsonl"
    good = b'{"text.in": "one", "text": "one"}'
    path.write_bytes(good + b"\r\n\n" + line + b"\n  \n" + good + b"\n\r\n" + good)
    first, reject, *others = read(path, Format("records", field))
    assert [first, *others] == ["one"] * 3
    assert (reject.path, reject.at) == ("a.jsonl", len(good) + 3)
    if field == "text":
        assert reject.reason == reason


def test_details_of_bad_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in BAD_RECORDS))
    found = read(tmp_path / "a.jsonl")
    assert reasons(found) == [reason for _, reason in BAD_RECORDS]
    assert [r.detail for r in found[5:9]] == ["fields: content, id", "null", "int", "list"]
    at = 0
    for reject, (line, _) in zip(found, BAD_RECORDS, strict=True):
        assert reject.at == at
        at += len(line) + 1


@pytest.mark.parametrize("longest", [1 << 24, 4])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, name, longest):
    monkeypatch.setattr(documents, "LONG_BYTES", longest)
    monkeypatch.setattr(
        "gristmill.data.raw.readers.jsonl._BLOCK_BYTES", 1 << 19 if longest > 8 else 5
    )
    line = b'{"text": "one"}'
    data = b"[" + line + b"]" if name == "b.json" else line + b"\n" + line
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert read(tmp_path / name) == ["one"] * (1 if name == "b.json" else 2)


def test_numbers_that_only_python_writes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "NaN", "score": NaN}\n{"text": "b", "n": -Infinity}\n{"text": NaN}')
    assert reasons(read(path)) == ["NaN", "b", "field 'text' is not text"]


def test_nested_text(tmp_path):
    lines = [
        {"a": {"b": "nested"}},
        {"a.b": "flat", "a": {"b": "nested"}},
        {"a": {"c": 1}},
        {"a": "b"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read(tmp_path / "a.jsonl", Format("records", "a.b"))
    assert reasons(found) == ["nested", "flat", "no field 'a.b'", "no field 'a.b'"]


ROWS = [
    {"text": "one", "lang": "en", "meta": {"n": 1}},
    {"text": None, "lang": "de", "meta": {"n": 2}},
    {"text": "three", "lang": "en", "meta": None},
    {"text": None, "lang": "en", "meta": {"n": 4}},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_filters_come_before_the_text(tmp_path, name):
    path = tmp_path / name
    save(path, ROWS)
    null = "field 'text' is not text"
    assert reasons(read(path, filters={"lang": "en"})) == ["one", FILTERED, "three", null]
    found = read(path, filters={"meta.n": {"max": 1}, "lang": "en"})
    assert found == ["one", FILTERED, FILTERED, FILTERED]
    assert reasons(read(path, filters={"meta.n": {"not_in": [1]}})) == [
        FILTERED,
        null,
        "three",
        null,
    ]
    assert read(path, filters={"nowhere": "x"}) == [FILTERED] * 4
    assert reasons(read(path, filters={"nowhere.x": {"not_in": ["x"]}})) == [
        "one",
        null,
        "three",
        null,
    ]
    # Neither the text nor the filter's field is there.
    found = read(path, Format("records", "words"), {"nowhere": {"not_in": ["x"]}})
    assert {(r.reason, r.detail) for r in found} == {
        ("no field 'words'", "fields: text, lang, meta")
    }
    assert [r.at for r in found] == sorted({r.at for r in found})
    assert read(path, Format("records", "words"), {"nowhere": "x"}) == [FILTERED] * 4
    found = read(path, Format("records", "words"), {"lang": "de"})
    assert reasons(found) == [FILTERED, "no field 'words'", FILTERED, FILTERED]


def save(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, 3)


def test_json_arrays(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"text": "a ] } \\" b"}, 3, "x", null,\n[{"text": "c"}], {"text": {}}, {} ] \n'
    )
    found = read(path)
    assert found[0] == 'a ] } " b'
    odd = ["not an object"] * 4 + ["field 'text' is not text", "no field 'text'"]
    assert reasons(found[1:]) == odd
    text = path.read_text()
    assert [r.at for r in found[1:3]] == [text.index("3,"), text.index('"x"')]
    path.write_text(" \n [ ] ")
    assert read(path) == []
    path.write_text("[")
    with pytest.raises(DataError, match="the array has no end"):
        read(path)


def test_a_bad_element_costs_one_element(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text" "b"}, {"text": "c"}]')
    found = read(path)
    assert reasons(found) == ["a", "not UTF-8", "bad JSON", "c"]
    assert found[1].at == 16


def test_an_array_with_a_bad_tail(tmp_path):
    path = tmp_path / "a.json"
    good = b'[{"text": "a"}, {"text": "b"}'
    for tail in (b"", b",", b', {"text": "c', b', {"text": "c"', b"}", b", 12"):
        path.write_bytes(good + tail)
        (item,) = list_inputs(path, "*")
        found = sources.read_span(RECORDS, root_of(path), item, Span(0, 0, -1))
        assert [next(found), next(found)] == ["a", "b"]
        with pytest.raises(DataError, match=r"a\.json is damaged or incomplete"):
            list(found)
    path.write_bytes(good + b'] [{"text": "c"}]')
    *texts, reject = read(path)
    assert texts == ["a", "b"]
    assert (reject.reason, reject.at) == ("bad JSON", 29)
    assert "after the end of the array" in reject.detail


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3), max_size=5),
    st.integers(1, 50),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([9, 1 << 24]),
)
def test_arrays_of_any_records_are_parted(tmp_path_factory, rows, block, indent, longest):
    rows = [row | {"text": json.dumps(row)} for row in rows]
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(block % 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONG_BYTES", longest)
        patch.setattr("gristmill.data.raw.readers.json_array._BLOCK_BYTES", block)
        assert read(path) == [row["text"] for row in rows]


# Long records.


def outline(data: bytes, step: int, form: Format = RECORDS, **options) -> list:
    item = Input("a.jsonl", "a.jsonl", len(data))
    reading = Reading(form, Storage("."), item, Span(0, 0, -1), **options)
    with Outline(reading, 7) as taken:
        for at in range(0, len(data), step):
            assert taken.add(data[at : at + step]) == len(data[at : at + step])
        return [plain(d) if isinstance(d, LongJson) else d for d in taken.document()]


@given(
    text=st.text(st.sampled_from('a"\\\n{]é中🙂\x7f'), max_size=80),
    other=st.text(st.sampled_from('b"\\['), max_size=40),
    ascii_only=st.booleans(),
    step=st.integers(1, 40),
    piece=st.integers(13, 30),
)
def test_long_records_of_any_text(text, other, ascii_only, step, piece):
    record = {"o": other, "x": [{other: 1}], "text": text, "z": other}
    data = json.dumps(record, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONG_BYTES", 3)
        patch.setattr("gristmill.data.raw.readers.long_json._STRING_BYTES", 12)
        patch.setattr("gristmill.data.raw.readers.long_json._PIECE_BYTES", piece)
        assert outline(data, step) == [text]


@given(st.text(st.sampled_from("a\\🙂é\n"), max_size=30), st.booleans())
def test_both_sides_of_a_cut_are_text(text, ascii_only):
    body = json.dumps(text, ensure_ascii=ascii_only).encode()[1:-1]
    for end in range(1, len(body) + 1):
        at = cut_point(body[:end])
        assert 0 <= end - at <= 12
        halves = [json.loads(b'"' + half + b'"') for half in (body[:at], body[at:])]
        assert "".join(halves) == text
        assert all(half.encode() is not None for half in halves)


def test_a_million_backslashes():
    body = b"\\\\" * 1_000_000
    assert [cut_point(body[:end]) for end in (999_999, 1_000_000)] == [999_998, 1_000_000]


def test_long_records_without_a_long_text(monkeypatch):
    monkeypatch.setattr("gristmill.data.raw.readers.long_json._STRING_BYTES", 12)
    long = b'"' + b"x" * 100 + b'"'
    assert outline(b'{"m": ' + long + b', "text": "short"}', 9) == ["short"]
    assert reasons(outline(b'{"m": ' + long + b"}", 9)) == ["no field 'text'"]
    assert reasons(outline(b'{"m": ' + long, 9)) == ["bad JSON"]
    assert reasons(outline(b'{"text": ' + long[:-1], 9)) == ["bad JSON"]
    assert outline(b" " * 100, 9) == []
    selection = Selection.from_settings({"lang": "en"})
    data = b'{"lang": "de", "text": ' + long + b"}"
    assert outline(data, 9, selection=selection) == [FILTERED]


def test_a_record_too_large_for_its_outline(monkeypatch):
    monkeypatch.setattr("gristmill.data.raw.readers.long_json._OUTLINE_BYTES", 50)
    data = b'{"text": "a", "list": [' + b"1, " * 100 + b"1]}"
    (reject,) = outline(data, 9)
    assert (reject.reason, reject.at) == ("record too large", 7)


def test_no_room_for_a_long_record(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(RunError, match=r"cannot be kept in .*No space left.*TMPDIR") as raised:
        outline(b'{"text": "a"}', 5)
    assert not isinstance(raised.value, DataError)


# Columns.

COLUMN = ["one", None, "", "dreiß", "🙂"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_kinds_of_text_columns(tmp_path, suffix, kind):
    plain_array = pa.array(COLUMN, pa.large_string())
    if pa.types.is_dictionary(kind):
        array = pa.array(COLUMN).dictionary_encode().cast(kind)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        array = pa.array([t and t.encode() for t in COLUMN], kind)
    else:
        array = plain_array.cast(kind)
    table = pa.table({"n": range(5), "text": array})
    path = tmp_path / f"a{suffix}"
    write(path, table, rows=2)
    found = read(path)
    assert (found[0], *found[2:]) == ("one", "", "dreiß", "🙂")
    assert found[1] == Reject(path.name, 1, "field 'text' is not text", "null")


def write(path: Path, table: pa.Table, rows: int = 2) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, rows)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_bad_rows_cost_one_row(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, pa.table({"text": pa.array([b"a", b"b \xff", b"c", b"\xc3"], pa.binary())}), 3)
    found = read(path)
    assert reasons(found) == ["a", "not UTF-8", "c", "not UTF-8"]
    assert [r.at for r in found if isinstance(r, Reject)] == [1, 3]
    assert "byte 2 of the text" in found[1].detail


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_that_are_no_text(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, pa.table({"text": [1, 2, 3]}))
    assert [(r.reason, r.detail, r.at) for r in read(path)] == [
        ("field 'text' is not text", "int64", n) for n in range(3)
    ]
    write(path, pa.table({"content": ["a", "b"], "id": [1, 2]}))
    assert [(r.reason, r.detail) for r in read(path)] == [
        ("no field 'text'", "fields: content, id")
    ] * 2


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_nested_columns(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rows = [{"a": {"b": {"c": "x"}, "n": 1}}, {"a": None}, {"a": {"b": None, "n": 3}}]
    table = pa.Table.from_pylist(rows).append_column("a.b", pa.array(["p", "q", "r"]))
    write(path, table)
    null = "field 'a.b.c' is not text"
    assert reasons(read(path, Format("records", "a.b.c"))) == ["x", null, null]
    assert read(path, Format("records", "a.b")) == ["p", "q", "r"]
    assert set(reasons(read(path, Format("records", "a.x")))) == {"no field 'a.x'"}
    assert set(reasons(read(path, Format("records", "a")))) == {"field 'a' is not text"}
    found = read(path, Format("records", "a.b"), {"a.n": {"min": 2}})
    assert found == [FILTERED, FILTERED, "r"]


def test_filters_on_dates_and_decimals(tmp_path):
    days = [datetime.datetime(2020, 1, day) for day in (1, 2, 3)]
    prices = [decimal.Decimal("0.50"), decimal.Decimal("1.50"), None]
    table = pa.table({"text": ["a", "b", "c"], "day": days, "price": prices})
    write(tmp_path / "a.parquet", table)
    assert read(tmp_path / "a.parquet", filters={"day": {"min": "2020-01-02"}})[1:] == ["b", "c"]
    found = read(tmp_path / "a.parquet", filters={"price": {"min": 1}})
    assert found == [FILTERED, "b", FILTERED]


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"noise": ["n" * 50] * 9, "text": ["t"] * 9, "lang": ["en"] * 9})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    options["write_statistics"] = False
    pq.write_table(table, path, **options)
    data = path.read_bytes()
    at = data.index(b"n" * 50)
    path.write_bytes(data[:at] + b"x" * 9 + data[at + 9 :])
    assert read(path, filters={"lang": "en"}) == ["t"] * 9
    with pytest.raises(DataError):
        read(path, filters={"noise": "x"})


def test_empty_tables(tmp_path):
    empty = pa.table({"text": pa.array([], pa.string())})
    write(tmp_path / "a.parquet", empty)
    write(tmp_path / "a.arrow", empty)
    assert read(tmp_path / "a.parquet") == read(tmp_path / "a.arrow") == []
    first = pa.table({"text": ["a", "b"]}).slice(1)
    write(tmp_path / "b.arrow", first)
    assert read(tmp_path / "b.arrow") == ["b"]


def test_batches_of_large_texts_have_few_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("gristmill.data.raw.readers.parquet._BATCH_BYTES", 1000)
    table = pa.table({"text": [f"{n}" * 300 for n in range(9)]})
    pq.write_table(table, tmp_path / "a.parquet")
    seen = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(self, batch_size, **options):
        seen.append(batch_size)
        return real(self, batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert read(tmp_path / "a.parquet") == table["text"].to_pylist()
    assert len(seen) == 1
    assert 1 <= seen[0] <= 4

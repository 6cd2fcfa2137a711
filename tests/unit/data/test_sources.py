# ruff: noqa: F811 (fixtures are imported)
"""Reading as a whole: which reader, spans, changes, damage, remote files, long documents."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.raw import documents, sources
from gristmill.data.raw.documents import DataError, Format, Input, Reject, Span, Unreadable
from gristmill.data.raw.inputs import list_inputs, root_of
from gristmill.data.raw.select import Selection
from gristmill.data.raw.sources import is_parted, iter_documents
from gristmill.data.storage import Storage
from gristmill.util.errors import UserError

from .s3 import bucket, s3_server  # noqa: F401

TEXT = Format("text")
RECORDS = Format("records")

TEXTS = [f"document {n} " + "é" * (n % 7) for n in range(60)]
LINES = b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in TEXTS)
TABLE = pa.table({"n": list(range(60)), "text": TEXTS})


def compress(kind: str, data: bytes) -> bytes:
    """In two frames or members."""
    if kind == ".gz":
        return gzip.compress(data[:500]) + gzip.compress(data[500:])
    if kind == ".zst":
        pack = zstandard.ZstdCompressor().compress
        return pack(data[:500]) + pack(data[500:])
    return data


def stream_bytes(table: pa.Table, rows: int = 7, *, file: bool = False) -> bytes:
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_file if file else pa.ipc.new_stream
    with new(sink, table.schema) as writer:
        writer.write_table(table, rows)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"row_group_size": 7} | options)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": compress(".gz", LINES),
    "a.ndjson.zst": compress(".zst", LINES),
    "lines.json": LINES,
    "array.json": b"[" + b",".join(LINES.splitlines()) + b"]",
    "array.json.gz": compress(".gz", b" [\n" + b" , ".join(LINES.splitlines()) + b"\n]\n"),
    "array.json.zst": compress(".zst", b"[" + b",\n".join(LINES.splitlines()) + b"]"),
    "a.parquet": parquet_bytes(TABLE),
    "stream.arrow": stream_bytes(TABLE),
    "file.arrow": stream_bytes(TABLE, file=True),
    "part-000": LINES,
}

DAMAGED = [name for name in FILES if name not in ("a.jsonl", "lines.json", "part-000")]


def plain(found) -> list:
    """Documents with the pieces of long ones joined."""
    return [d if isinstance(d, str | Reject) else "".join(d.pieces()) for d in found]


def read(path: Path | str, form: Format, start: int = 0, stop: int = -1, **options) -> list:
    (item,) = list_inputs(path, "*")
    return plain(sources.read_span(form, root_of(path), item, Span(0, start, stop), **options))


@pytest.fixture(params=["disk", "url"])
def place(request, tmp_path) -> str:
    """Where files are put: a folder, and a URL that stands for an object store."""
    return str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}/data"


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_same_documents(place, name):
    Storage(place).write(name, FILES[name])
    assert read(f"{place}/{name}", RECORDS) == TEXTS


@pytest.mark.parametrize("name", [n for n in FILES if "parquet" not in n])
@pytest.mark.parametrize("block", [1, 50, 700])
def test_a_store_is_read_in_advance(monkeypatch, name, block):
    monkeypatch.setattr("gristmill.data.raw.readers.reading._AHEAD_BYTES", block)
    place = f"memory://{uuid.uuid4().hex}/data"
    Storage(place).write(name, FILES[name])
    assert read(f"{place}/{name}", RECORDS) == TEXTS
    if name == "a.jsonl":
        assert (
            read(f"{place}/{name}", RECORDS, 0, 99) + read(f"{place}/{name}", RECORDS, 99) == TEXTS
        )
    if name in DAMAGED:
        Storage(place).write(name, FILES[name][:-20])
        with pytest.raises(DataError, match="is damaged or incomplete"):
            read(f"{place}/{name}", RECORDS)


def test_a_web_server_is_read(tmp_path):
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    for name in ("a.jsonl", "x/a.jsonl.gz"):
        Storage(tmp_path).write(name, FILES[Path(name).name])
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert read(f"{url}/x/a.jsonl.gz", RECORDS) == TEXTS
        inputs = list_inputs(f"{url}/", "**/*.jsonl*")
        assert [(i.path, i.size > 0) for i in inputs] == [("a.jsonl", True), ("x/a.jsonl.gz", True)]
        assert list(sources.documents(RECORDS, Storage(url), inputs, print)) == TEXTS * 2
        server.shutdown()


def test_text_is_read_from_anywhere(place):
    Storage(place).write("a.txt", b"one")
    Storage(place).write("b.txt.gz", gzip.compress(b"two"))
    assert read(f"{place}/a.txt", TEXT) + read(f"{place}/b.txt.gz", TEXT) == ["one", "two"]


def test_which_files_are_parted():
    assert [is_parted(RECORDS, n) for n in ("a.jsonl", "b.PARQUET", "c")] == [True] * 3
    names = ("a.jsonl.gz", "a.json", "a.arrow", "a.json.zst", "a.jsonl.zst")
    assert not any(is_parted(RECORDS, n) for n in names)
    assert not is_parted(TEXT, "a.jsonl")


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["", ".gz", ".zst"]),
    crlf=st.booleans(),
    cuts=st.sets(st.integers(1, len(LINES)), max_size=6),
    block=st.integers(1, 300),
    longest=st.sampled_from([30, 100_000]),
)
def test_cut_anywhere_every_line_is_read_once(tmp_path_factory, kind, crlf, cuts, block, longest):
    path = tmp_path_factory.mktemp("cut") / f"a.jsonl{kind}"
    path.write_bytes(compress(kind, LINES.replace(b"\n", b"\r\n") if crlf else LINES))
    ends = [0, *sorted(cuts), -1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gristmill.data.raw.readers.jsonl._BLOCK_BYTES", block)
        patch.setattr(documents, "LONG_BYTES", longest)
        found = [t for a, b in zip(ends, ends[1:], strict=False) for t in read(path, RECORDS, a, b)]
    assert found == TEXTS


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.sets(st.integers(1, len(FILES["a.parquet"])), max_size=6),
    rows=st.integers(1, 70),
    dictionary=st.booleans(),
)
def test_cut_anywhere_every_row_group_is_read_once(tmp_path_factory, cuts, rows, dictionary):
    path = tmp_path_factory.mktemp("cut") / "a.parquet"
    path.write_bytes(parquet_bytes(TABLE, row_group_size=rows, use_dictionary=dictionary))
    ends = [0, *sorted(cuts), -1]
    spans = zip(ends, ends[1:], strict=False)
    assert [t for a, b in spans for t in read(path, RECORDS, a, b)] == TEXTS


def test_cuts_at_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    end = LINES.index(b"\n") + 1
    assert read(path, RECORDS, 0, end) == TEXTS[:1]
    assert read(path, RECORDS, end, -1) == TEXTS[1:]


@pytest.mark.parametrize("missing", [1, 9, 20, 200])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_file_is_named_and_never_taken_as_whole(place, name, missing):
    Storage(place).write(name, FILES[name][:-missing])
    with pytest.raises(DataError, match=rf"{name} is damaged or incomplete .*quarantine") as raised:
        read(f"{place}/{name}", RECORDS)
    assert raised.value.path == name


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson.zst", "a.parquet"])
def test_a_file_with_something_else_in_it_is_named(tmp_path, name):
    whole, at = FILES[name], 40
    if name == "a.parquet":
        options = {"write_page_checksum": True, "compression": "none"}
        whole = parquet_bytes(TABLE, use_dictionary=False, **options)
        at = whole.index(b"document 30")
    elif name == "a.ndjson.zst":
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
    for data in (b"no such thing at all", whole[:at] + b"\xa5" * 9 + whole[at + 9 :]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="is damaged or incomplete"):
            read(tmp_path / name, RECORDS)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_an_empty_file_of_a_form_with_an_end_is_damaged(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="is damaged or incomplete"):
        read(tmp_path / name, RECORDS)


def test_empty_files_of_lines_hold_nothing(tmp_path):
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        assert read(tmp_path / name, RECORDS) == []


def test_a_missing_file_is_named(place):
    item = Input("a.jsonl", "a.jsonl", 3)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl") as raised:
        list(sources.read_span(RECORDS, Storage(place), item, Span(0, 0, -1)))
    assert raised.value.path == "a.jsonl"
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=rf"cannot read .*{name}"):
            list(sources.read_span(RECORDS, Storage(place), Input(name, name, 30), Span(0, 0, -1)))


@pytest.mark.parametrize("size", [3, 1 << 30])
def test_errors_of_a_store_are_errors_of_the_file(monkeypatch, size):
    class Failing:
        closed = False

        def read(self, size):
            raise RuntimeError("the endpoint is gone")

        def seek(self, *place):
            return 0

        def close(self):
            pass

    monkeypatch.setattr(Storage, "open", lambda self, name: Failing())
    for name in ("a.jsonl", "a.json", "a.jsonl.zst"):
        item = Input(name, name, size)
        found = sources.read_span(RECORDS, Storage("s3://b/x"), item, Span(0, 0, -1), check=False)
        with pytest.raises(DataError, match=r"cannot read .*RuntimeError: the endpoint is gone"):
            list(found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.zst", "a.parquet"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, name):
    storage = Storage(tmp_path)
    storage.write(name, FILES[name])
    (item,) = list_inputs(tmp_path / name, "*")
    form, root, span = RECORDS, root_of(tmp_path / name), Span(0, 0, -1)
    found = sources.read_span(form, root, item, span)
    next(found)
    storage.write(name, FILES[name])
    with pytest.raises(DataError, match="has changed while it was being prepared") as raised:
        list(found)
    assert raised.value.path == name
    with pytest.raises(DataError, match="has changed"):
        list(sources.read_span(form, root, item, span))
    assert len(list(sources.read_span(form, root, item, span, check=False))) == 60


def test_a_changed_object_is_noticed(bucket):
    Storage(bucket).write("x/a.jsonl.zst", FILES["a.ndjson.zst"])
    (item,) = list_inputs(bucket, "**/*.jsonl*")
    span = Span(0, 0, -1)
    assert plain(sources.read_span(RECORDS, Storage(bucket), item, span)) == TEXTS
    assert read(f"{bucket}/x/a.jsonl.zst", RECORDS) == TEXTS
    Storage(bucket).write("x/a.jsonl.zst", compress(".zst", LINES.replace(b" 3", b" 4")))
    with pytest.raises(DataError, match="has changed"):
        list(sources.read_span(RECORDS, Storage(bucket), item, span))


def test_parquet_from_an_object_store(bucket, monkeypatch):
    table = TABLE.append_column("lang", pa.array(["en", "de"] * 30))
    Storage(bucket).write("a.parquet", parquet_bytes(table))
    selection = Selection.from_settings({"lang": "en"})
    for most in (1 << 30, 0):
        monkeypatch.setattr("gristmill.data.raw.readers.parquet._MAX_FETCHED_BYTES", most)
        (item,) = list_inputs(bucket, "*")
        found = sources.read_span(
            RECORDS, Storage(bucket), item, Span(0, 0, -1), selection=selection
        )
        assert [d for d in found if d is not documents.FILTERED] == TEXTS[::2]


def test_a_store_without_versions_tells_by_size():
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    storage.write("a.jsonl", LINES)
    (item,) = list_inputs(storage.root, "*")
    storage.write("a.jsonl", LINES[:100])
    with pytest.raises(DataError, match="has changed"):
        list(sources.read_span(RECORDS, storage, item, Span(0, 0, -1)))


def test_a_large_file_is_compared_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGE_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    item = Input("a.jsonl", "a.jsonl", len(LINES), "another version")
    with pytest.raises(DataError, match="has changed"):
        next(sources.read_span(RECORDS, Storage(tmp_path), item, Span(0, 0, -1)))


LONG = 'né"w \\ li\nne\t🙂 \u4e2d' * 3000
BROKEN = b'{"text": "' + b"x" * 100_000 + b'\xff"}\n'


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".json", ".parquet", ".arrow", ".txt"])
def test_a_long_document_comes_in_pieces(place, kind, monkeypatch):
    monkeypatch.setattr(documents, "LONG_BYTES", 20_000)
    for reader in ("long_json", "columns"):
        monkeypatch.setattr(f"gristmill.data.raw.readers.{reader}._PIECE_BYTES", 1001)
    for reader in ("text", "jsonl", "json_array"):
        monkeypatch.setattr(f"gristmill.data.raw.readers.{reader}._BLOCK_BYTES", 777)
    texts = ["before", LONG, "between", LONG + "!", "after"]
    lines = "\n".join(json.dumps({"id": [1], "text": t, "m": {"x": 1}}) for t in texts).encode()
    table = pa.table({"text": texts})
    data = {
        ".jsonl": lines,
        ".jsonl.zst": compress(".zst", lines),
        ".json": b"[" + b",\n".join(lines.splitlines()) + b"]",
        ".parquet": parquet_bytes(table),
        ".arrow": stream_bytes(table),
        ".txt": "<|>".join(texts).encode(),
    }[kind]
    Storage(place).write(f"a{kind}", data)
    form = Format("text", separator="<|>") if kind == ".txt" else RECORDS
    (item,) = list_inputs(f"{place}/a{kind}", "*")
    found, sizes = [], []
    for document in sources.read_span(form, Storage(place), item, Span(0, 0, -1)):
        if isinstance(document, str):
            found.append(document)
        else:
            pieces = list(document.pieces())
            sizes.append(max(map(len, pieces)))
            found.append("".join(pieces))
    assert found == texts
    assert len(sizes) == 2
    assert max(sizes) < 3000


def test_a_long_document_need_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONG_BYTES", 20_000)
    texts = ["before", LONG, "after"]
    lines = "\n".join(json.dumps({"text": t}) for t in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text("<|>".join(texts))
    for name, form in (("a.jsonl", RECORDS), ("b.txt", Format("text", separator="<|>"))):
        (item,) = list_inputs(tmp_path / name, "*")
        found = list(sources.read_span(form, Storage(tmp_path), item, Span(0, 0, -1)))
        assert (found[0], found[2]) == ("before", "after")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_a_long_document_that_turns_out_bad(tmp_path, name, monkeypatch):
    monkeypatch.setattr(documents, "LONG_BYTES", 20_000)
    monkeypatch.setattr("gristmill.data.raw.readers.jsonl._BLOCK_BYTES", 5000)
    good = LINES.splitlines()[0] + b"\n"
    cell = pa.array([b"x" * 100_000 + b"\xff"], pa.binary())
    data = {
        "a.jsonl": good + BROKEN + good,
        "a.json": b"[" + good + b"," + BROKEN + b"," + good + b"]",
        "a.txt": b"document 0 --" + b"x" * 100_000 + b"\xff" + b"--document 0 ",
        "a.parquet": parquet_bytes(
            pa.table({"text": pa.concat_arrays([pa.array([b"document 0 "]), cell] * 1)})
        ),
    }[name]
    (tmp_path / name).write_bytes(data)
    form = Format("text", separator="--") if name == "a.txt" else RECORDS
    (item,) = list_inputs(tmp_path / name, "*")
    found = []
    for document in sources.read_span(form, Storage(tmp_path), item, Span(0, 0, -1)):
        if isinstance(document, str):
            found.append(document)
            continue
        with pytest.raises(Unreadable) as raised:
            "".join(document.pieces())
        found.append(raised.value.reject)
    assert found[0] == "document 0 "
    assert found[1].path == name
    assert found[1].reason == "not UTF-8"
    assert found[2:] == ([] if name == "a.parquet" else ["document 0 "])


MEASURE = """
import re, sys
from gristmill.data.raw import sources
from gristmill.data.raw.documents import Format, Span
from gristmill.data.raw.inputs import list_inputs, root_of

def peak_mb():
    # Unlike ru_maxrss, not what the process was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

path = sys.argv[1]
(item,) = list_inputs(path, "*")
form = Format("text" if ".txt" in path else "records")
before, size = peak_mb(), 0
for document in sources.read_span(form, root_of(path), item, Span(0, 0, -1)):
    size += sum(map(len, [document] if isinstance(document, str) else document.pieces()))
print(size, peak_mb() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_a_document_of_one_gigabyte_takes_little_memory(tmp_path, name):
    path = tmp_path / name
    opened = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    is_text = name == "a.txt"
    block = "A line of text.\nAnother one.\n" * 36_000
    written = block if is_text else json.dumps(block)[1:-1]
    with opened(path, "wb") as file:
        file.write({"a.txt": b"", "a.json": b'[{"text": "'}.get(name, b'{"text": "'))
        for _ in range(1000):
            file.write(written.encode())
        file.write({"a.txt": b"", "a.json": b'"}]'}.get(name, b'"}'))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    size, grown_mb = map(int, done.stdout.split())
    assert size == 1000 * len(block) > 1_000_000_000
    assert grown_mb < 250


def test_iter_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_text('{"text": "  "}\n{"no": 1}\n{"text": "last"}')
    assert list(iter_documents(tmp_path, "jsonl")) == [*TEXTS, "last"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.md").write_text("one--two")
    found = iter_documents(tmp_path / "t", "textfiles", pattern="*.md", separator="--")
    assert list(found) == ["one", "two"]


def test_iter_documents_keeps_to_the_layout(tmp_path):
    lines = [
        {"text": name, "meta": {"redpajama_set_name": name}}
        for name in ("RedPajamaC4", "RedPajamaGithub")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = iter_documents(tmp_path, "slimpajama", pattern="*.jsonl")
    assert list(found) == ["RedPajamaC4"]


def test_long_documents_are_iterated_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONG_BYTES", 20_000)
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": LONG}).encode() + b"\n" + BROKEN)
    assert "".join(iter_documents(tmp_path, "jsonl")).startswith(LONG)
    rejects: list[Reject] = []
    inputs = list_inputs(tmp_path, "*")
    list(sources.documents(RECORDS, Storage(tmp_path), inputs, rejects.append))
    assert [r.reason for r in rejects] == ["not UTF-8"]


def test_nothing_readable_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"no field 'text'; fields: content, id\).*--text_field"):
        list(iter_documents(tmp_path, "jsonl"))
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no field 'text'; fields: content, id\).*--text_field"):
        list(iter_documents(tmp_path, "parquet"))
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=r"b\.txt: binary; holds NUL bytes\).*UTF-8"):
        list(iter_documents(tmp_path, "textfiles"))
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        list(iter_documents(tmp_path, "textfiles"))
    with pytest.raises(UserError, match="unknown layout 'csv'. use one of: textfiles, jsonl"):
        list(iter_documents(tmp_path, "csv"))

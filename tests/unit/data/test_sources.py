from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data import sources
from gristmill.data.sources import Format, Reject, Span, digest_span, iter_documents, list_inputs
from gristmill.util.errors import RunError, UserError

TEXT = Format("textfiles", "", None)
JSONL = Format("jsonl", "text", None)


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def paths(root: Path, pattern: str, **options) -> list[str]:
    return [item.path for item in list_inputs(root, pattern, **options)]


def read(path: Path, form: Format, start: int = 0, stop: int = -1) -> list[str | Reject]:
    root = path.parent
    (item,) = list_inputs(path, "*")
    whole = path.suffix in (".gz", ".zst")
    digest = digest_span(path, 0, -1) if whole else digest_span(path, start, stop)
    return list(sources.read_span(form, root, item, Span(0, start, stop, digest)))


def test_patterns(tmp_path):
    put(tmp_path, "a.txt", "b.md", "x/c.txt", "x/y/d.txt", "x/y/e.TXT", "z[1].txt")
    assert paths(tmp_path, "**/*.txt") == ["a.txt", "x/c.txt", "x/y/d.txt", "z[1].txt"]
    assert paths(tmp_path, "*.txt") == ["a.txt", "z[1].txt"]
    assert paths(tmp_path, "x/*/?.txt") == ["x/y/d.txt"]
    assert paths(tmp_path, "x/**") == ["x/c.txt", "x/y/d.txt", "x/y/e.TXT"]
    assert paths(tmp_path, "**/[ab].*") == ["a.txt", "b.md"]
    assert paths(tmp_path, "**/y/*") == ["x/y/d.txt", "x/y/e.TXT"]
    assert len(paths(tmp_path, "**/*")) == 6


def test_a_single_file_needs_no_pattern(tmp_path):
    put(tmp_path, "notes.md", "other.txt")
    assert paths(tmp_path / "notes.md", "**/*.txt") == ["notes.md"]


def test_hidden_files_caches_and_the_output_are_left_out(tmp_path):
    put(tmp_path, "a.txt", ".b.txt", ".gristmill/k/c.txt", "out/d.txt", "data/tokenizer/merges.txt")
    put(tmp_path, "data/manifest.json", "data/index.json")
    assert paths(tmp_path, "**/*.txt", exclude=[tmp_path / "out"]) == ["a.txt"]


def test_a_file_with_two_names_is_taken_once(tmp_path):
    put(tmp_path, "b/x.txt")
    (tmp_path / "a.txt").symlink_to(tmp_path / "b" / "x.txt")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = list_inputs(tmp_path, "**/*.txt")
    assert [item.path for item in found] == ["a.txt"]
    assert found[0].size == len("b/x.txt")


def test_paths_are_sorted_by_their_normalised_bytes(tmp_path):
    put(tmp_path, "e\u0301.txt", "Z.txt", "a.txt", "é2.txt", "中.txt")
    assert paths(tmp_path, "*") == ["Z.txt", "a.txt", "\xe9.txt", "\xe92.txt", "中.txt"]


def test_an_empty_folder_says_what_is_there(tmp_path):
    put(tmp_path, "a.md", "b.md", "c.pdf")
    with pytest.raises(
        UserError, match=r"matches '\*\*/\*\.txt' \(there: 2 \.md, 1 \.pdf\).*\*\.md'"
    ):
        list_inputs(tmp_path, "**/*.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="there: no files"):
        list_inputs(tmp_path / "none", "**/*.txt")


def test_missing_and_unread_forms(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        list_inputs(tmp_path / "nowhere", "*")
    put(tmp_path, "a.jsonl.bz2")
    with pytest.raises(UserError, match=r"form that is not read \(\.bz2\)"):
        list_inputs(tmp_path, "**/*.jsonl*")


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    put(tmp_path, "a.txt", "locked/b.txt")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "locked"))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*a\.txt \(Permission denied\).*chmod"):
        digest_span(tmp_path / "a.txt", 0, -1)
    monkeypatch.undo()

    def walk(root, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "locked")))
        yield from ()

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match=r"cannot read the folder .*locked \(Permission denied\)"):
        list_inputs(tmp_path, "**/*.txt")


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\nline  ".encode())
    assert read(path, TEXT) == ["é\r\nline  "]
    assert read(path, Format("textfiles", "", "\r\n")) == ["é", "line  "]
    path.write_bytes(b"abc\0def")
    assert read(path, TEXT) == [Reject("a.txt", 0, "binary", "holds NUL bytes")]
    path.write_bytes(b"ok \xff\xfe")
    (reject,) = read(path, TEXT)
    assert (reject.reason, reject.at) == ("not UTF-8", 3)


BAD_LINES = [
    (b'{"text": "a"', "bad JSON"),
    (b'{"text": "\xff"}', "bad JSON"),
    (b'{"content": "a", "id": 1}', "no field 'text'"),
    (b'{"text": null}', "field 'text' is not text"),
    (b'{"text": 3}', "field 'text' is not text"),
    (b'["text"]', "not an object"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_costs_one_line(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n  \n{"text": "two"}')
    first, reject, last = read(path, JSONL)
    assert (first, last) == ("one", "two")
    assert (reject.path, reject.at, reject.reason) == ("a.jsonl", 17, reason)


RECORDS = [f"document {n} " + "é" * (n % 7) for n in range(60)]
LINES = b"".join(json.dumps({"text": r}, ensure_ascii=False).encode() + b"\n" for r in RECORDS)


def save_as(folder: Path, kind: str, data: bytes = LINES) -> Path:
    path = folder / f"a.jsonl{kind}"
    if kind == ".gz":
        data = gzip.compress(data[:500]) + gzip.compress(data[500:])
    elif kind == ".zst":
        compress = zstandard.ZstdCompressor().compress
        data = compress(data[:500]) + compress(data[500:])
    path.write_bytes(data)
    return path


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["", ".gz", ".zst"]), cuts=st.sets(st.integers(1, len(LINES)), max_size=6)
)
def test_cut_anywhere_every_line_is_read_once(tmp_path_factory, kind, cuts):
    path = save_as(tmp_path_factory.mktemp("cut"), kind)
    ends = [0, *sorted(cuts), -1]
    found = [t for a, b in zip(ends, ends[1:], strict=False) for t in read(path, JSONL, a, b)]
    assert found == RECORDS


def test_cuts_at_line_ends(tmp_path):
    path = save_as(tmp_path, "")
    end = LINES.index(b"\n") + 1
    assert read(path, JSONL, 0, end) == RECORDS[:1]
    assert read(path, JSONL, end, -1) == RECORDS[1:]


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_truncated_file_is_named_and_never_taken_as_whole(tmp_path, kind):
    path = save_as(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match=rf"a\.jsonl{kind} is damaged or incomplete"):
        read(path, JSONL)


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, kind):
    path = save_as(tmp_path, kind)
    (item,) = list_inputs(path, "*")
    span = Span(0, 0, -1, digest_span(path, 0, -1))
    save_as(tmp_path, kind, LINES.replace(b"document 30", b"Document 30"))
    with pytest.raises(RunError, match="has changed while it was being prepared"):
        list(sources.read_span(JSONL, tmp_path, item, span))


def test_iter_documents(tmp_path):
    save_as(tmp_path, "")
    (tmp_path / "b.jsonl").write_text('{"text": "  "}\n{"no": 1}\n{"text": "last"}')
    assert list(iter_documents(tmp_path, "jsonl")) == [*RECORDS, "last"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.md").write_text("one--two")
    found = iter_documents(tmp_path / "t", "textfiles", pattern="*.md", separator="--")
    assert list(found) == ["one", "two"]


def test_nothing_readable_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 1}\n')
    with pytest.raises(UserError, match=r"no field 'text'; fields: content, id\).*--text_field"):
        list(iter_documents(tmp_path, "jsonl"))
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=r"b\.txt: binary; holds NUL bytes\).*UTF-8"):
        list(iter_documents(tmp_path, "textfiles"))
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        list(iter_documents(tmp_path, "textfiles"))
    with pytest.raises(UserError, match="unknown layout 'csv'. use one of: textfiles, jsonl"):
        list(iter_documents(tmp_path, "csv"))

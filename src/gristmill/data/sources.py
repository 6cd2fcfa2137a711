"""Raw text as documents: which files are read, and what is in them.

Paths are relative to the input folder, in Unicode normal form C with forward slashes, and sorted by
their bytes, so that the order is the same on every machine.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import BinaryIO

import orjson
import xxhash

from gristmill.data import compressed, layouts
from gristmill.data.layouts import Layout
from gristmill.util.errors import RunError, UserError

CACHE = ".gristmill"
"""Folder of prepared datasets beside raw text; hidden folders are never taken as input."""

_READ_BYTES = 1 << 20
_UNREAD = {".parquet", ".bz2", ".xz", ".zip", ".7z", ".rar", ".tar", ".tgz"}


@dataclass(frozen=True)
class Input:
    """One input file: its normalised path below the root, its place there, and its bytes."""

    path: str
    place: str
    size: int


@dataclass(frozen=True)
class Span:
    """A part of an input: the lines that begin in bytes `start` to `stop` (-1: the end).

    For a compressed file these are bytes of its text. `digest` is that of the bytes as they lie on
    the disk, of the whole file where it is compressed.
    """

    input: int
    start: int
    stop: int
    digest: str


@dataclass(frozen=True)
class Format:
    """How a file parts into documents."""

    layout: str
    text_field: str
    separator: str | None

    @property
    def lines(self) -> bool:
        """Whether a document is a line, so that a file can be read from the middle."""
        return layouts.get(self.layout).records == "jsonl"


@dataclass(frozen=True)
class Reject:
    """A document that could not be read, where it is, and why. `detail` helps a person."""

    path: str
    at: int
    reason: str
    detail: str = ""


Documents = Iterator[str | Reject]


def root_of(path: Path) -> Path:
    """The folder that input paths are relative to: `path`, or the folder of a single file."""
    return path.parent if path.is_file() else path


def list_inputs(path: Path, pattern: str, *, exclude: Sequence[Path] = ()) -> list[Input]:
    """The files of a folder that match `pattern`, or the one file at `path`, sorted.

    Hidden files and folders are left out, and so is what lies in `exclude`; a file that is reached
    by two names is taken once. Raises UserError when there is nothing, or a form that is not read.
    """
    if not path.exists():
        raise UserError(f"there is no file or folder {path}. check the path of the input.")
    if path.is_file():
        found = [Input(_normal(path.name), path.name, path.stat().st_size)]
    else:
        skipped = {e.resolve() for e in exclude}
        found = _matching(path, pattern, skipped)
    for item in found:
        if Path(item.place).suffix.lower() in _UNREAD:
            raise UserError(
                f"{root_of(path) / item.place} is in a form that is not read "
                f"({Path(item.place).suffix}). unpack or convert it, or narrow the pattern "
                f"{pattern!r} (--pattern)."
            )
    return found


def _matching(root: Path, pattern: str, skipped: set[Path]) -> list[Input]:
    matches = re.compile(_regex(pattern)).fullmatch
    by_path: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for file in _files(root, skipped):
        relative = _normal(file.relative_to(root).as_posix())
        if matches(relative):
            by_path[relative] = file
        else:
            others[file.suffix or "no suffix"] += 1
    if not by_path:
        there = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(6)) or "no files"
        raise UserError(
            f"no file under {root} matches {pattern!r} (there: {there}). "
            f"give a pattern that fits, for example --pattern '{_suggestion(others)}'."
        )
    found: dict[str, Input] = {}
    for relative in sorted(by_path, key=lambda p: p.encode("utf-8", "surrogateescape")):
        real = os.path.realpath(by_path[relative])
        if real not in found:
            place = by_path[relative].relative_to(root).as_posix()
            try:
                found[real] = Input(relative, place, os.stat(real).st_size)
            except OSError as error:
                raise UserError(
                    f"{root / place} cannot be read ({error.strerror}). "
                    "mend it, move it away, or narrow the pattern (--pattern)."
                ) from None
    return list(found.values())


def _files(root: Path, skipped: set[Path]) -> Iterator[Path]:
    """Every file below `root` that may be input, each folder entered once."""
    entered = set(skipped)
    for folder, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        here = Path(folder)
        if {"manifest.json", "index.json"} <= set(files):
            # A prepared dataset: its tokenizer's files are no text of the corpus.
            folders.clear()
            continue
        wanted = []
        for name in sorted(folders):
            real = (here / name).resolve()
            if not name.startswith(".") and real not in entered:
                entered.add(real)
                wanted.append(name)
        folders[:] = wanted
        yield from (here / name for name in files if not name.startswith("."))


def _suggestion(others: Counter[str]) -> str:
    suffixes = [s for s, _ in others.most_common() if s != "no suffix"]
    return f"**/*{suffixes[0]}" if suffixes else "**/*"


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"cannot read the folder {error.filename} ({error.strerror}). "
        f"give yourself the right to read it: chmod u+rx '{error.filename}'"
    ) from error


def _normal(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _regex(pattern: str) -> str:
    """The glob as a regular expression; `**` stands for any number of folders, also none."""
    parts = []
    components = pattern.split("/")
    for number, component in enumerate(components):
        last = number == len(components) - 1
        if component == "**":
            parts.append(".*" if last else "(?:[^/]+/)*")
            continue
        # fnmatch's `*` and `?` would match a slash too.
        within = translate(component)[len("(?s:") : -len(r")\Z")]
        within = within.replace(".*", "[^/]*")
        parts.append(within + ("" if last else "/"))
    return "".join(parts)


def digest_span(path: Path, start: int, stop: int) -> str:
    """Digest of the bytes `start` to `stop` (-1: the end). Raises UserError when unreadable."""
    hashed = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = os.fstat(file.fileno()).st_size - start if stop < 0 else stop - start
            while left > 0 and (data := file.read(min(left, 4 * _READ_BYTES))):
                hashed.update(data)
                left -= len(data)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}). give yourself the right to read it: "
            f"chmod u+r '{path}', or narrow the pattern."
        ) from error
    return hashed.hexdigest()


def read_span(
    form: Format, root: Path, item: Input, span: Span, *, check: bool = True
) -> Documents:
    """The documents of a span, in the order of the file, unreadable ones as `Reject`.

    Raises RunError when the file is damaged or, with `check`, is not what the plan saw.
    """
    path = root / item.place
    reader = _records if form.lines else _texts
    try:
        with path.open("rb", buffering=0) as raw:
            watched = _Watched(raw, span, whole=compressed.is_compressed(path))
            yield from reader(form, item, span, watched)
            if check and not watched.agrees():
                raise RunError(
                    f"{path} has changed while it was being prepared. "
                    "run the same command again when nothing writes to it."
                )
    except (EOFError, zlib.error, gzip.BadGzipFile, compressed.Damaged) as error:
        raise RunError(
            f"{path} is damaged or incomplete ({error}). fetch it again, or move it away, "
            "and run the same command again."
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot read {path} ({error.strerror}). run the same command again when it is there."
        ) from error


def _texts(form: Format, item: Input, span: Span, raw: _Watched) -> Documents:
    data = raw.readall()
    if b"\0" in data:
        yield Reject(item.path, 0, "binary", "holds NUL bytes")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Reject(item.path, error.start, "not UTF-8", str(error.reason))
        return
    if form.separator:
        yield from text.split(form.separator)
    else:
        yield text


def _records(form: Format, item: Input, span: Span, raw: _Watched) -> Documents:
    for at, line in _lines(Path(item.place), span, raw):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if line.strip():
                yield Reject(item.path, at, "bad JSON", str(error))
            continue
        text = record.get(form.text_field) if type(record) is dict else None
        if type(text) is str:
            yield text
        elif type(record) is not dict:
            yield Reject(item.path, at, "not an object", type(record).__name__)
        elif form.text_field not in record:
            reason = f"no field {form.text_field!r}"
            yield Reject(item.path, at, reason, f"fields: {', '.join(list(record)[:20])}")
        else:
            kind = "null" if text is None else type(text).__name__
            yield Reject(item.path, at, f"field {form.text_field!r} is not text", kind)


def _lines(path: Path, span: Span, raw: _Watched) -> Iterator[tuple[int, bytes]]:
    """(position, line) of the lines that begin inside the span."""
    at = max(0, span.start - 1)
    if compressed.is_compressed(path):
        stream: BinaryIO = compressed.reader(path, raw)
        _skip(stream, at)
    else:
        raw.seek(at)
        stream = io.BufferedReader(raw, _READ_BYTES)
    if span.start > 0:
        # From the byte before: a line that begins exactly at `start` is not skipped.
        at += len(stream.readline())
    stop = float("inf") if span.stop < 0 else span.stop
    for line in stream:
        if at >= stop:
            return
        yield at, line
        at += len(line)


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0 and (data := stream.read(min(count, 4 * _READ_BYTES))):
        count -= len(data)


class _Watched(io.RawIOBase):
    """A file that digests the bytes of a span as they are read in order."""

    def __init__(self, file: io.FileIO, span: Span, *, whole: bool) -> None:
        self._file, self._digest = file, xxhash.xxh3_128()
        self._size = os.fstat(file.fileno()).st_size
        self._start = 0 if whole else span.start
        self._stop = self._size if whole or span.stop < 0 else span.stop
        self._expected, self._partial = span.digest, whole and span.stop >= 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        position = self._file.tell()
        count = self._file.readinto(buffer) or 0
        lowest, highest = max(position, self._start), min(position + count, self._stop)
        if highest > lowest:
            self._digest.update(memoryview(buffer)[lowest - position : highest - position])
        return count

    def readall(self) -> bytes:
        data = self._file.readall()
        self._digest.update(data)
        return data

    def agrees(self) -> bool:
        """Whether the span is what it was when it was planned.

        The first parts of a compressed file are not read to its end; its last part is.
        """
        if self._partial and self._file.tell() < self._size:
            return True
        return self._digest.hexdigest() == self._expected


def documents(
    form: Format, root: Path, inputs: Sequence[Input], on_reject: Callable[[Reject], None]
) -> Iterator[str]:
    """The readable documents of all inputs, in order."""
    for number, item in enumerate(inputs):
        for text in read_span(form, root, item, Span(number, 0, -1, ""), check=False):
            if isinstance(text, Reject):
                on_reject(text)
            else:
                yield text


def iter_documents(
    path: str | Path,
    layout: str,
    *,
    pattern: str | None = None,
    text_field: str = "text",
    separator: str | None = None,
) -> Iterator[str]:
    """The documents of a folder or file that hold text, one after another.

    Raises UserError when there are none, saying why.
    """
    kind: Layout = layouts.get(layout)
    given = Path(path).expanduser()
    inputs = list_inputs(given, pattern or kind.pattern)
    rejects: list[Reject] = []

    def note(reject: Reject) -> None:
        if len(rejects) < 1000:
            rejects.append(reject)

    num_documents = 0
    form = Format(layout, text_field, separator)
    for text in documents(form, root_of(given), inputs, note):
        if text and not text.isspace():
            num_documents += 1
            yield text
    if num_documents == 0:
        raise UserError(nothing_read(given, len(inputs), rejects))


def nothing_read(path: Path, num_inputs: int, rejects: Sequence[Reject]) -> str:
    """The message for inputs without a single document of text."""
    if not rejects:
        return f"{path} holds no text ({num_inputs} files, all empty). name other input."
    first = rejects[0]
    detail = f"; {first.detail}" if first.detail else ""
    advice = "name text that is UTF-8, or narrow the pattern (--pattern)."
    if first.reason.startswith(("no field", "field")):
        advice = "name the field that holds the text (--text_field)."
    return f"nothing in {path} could be read ({first.path}: {first.reason}{detail}). {advice}"

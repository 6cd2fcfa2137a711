"""Raw text as documents: the reader for each form of file, and what is said when there is none."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from gristmill.data.raw import layouts
from gristmill.data.raw.documents import (
    DataError,
    Document,
    Filtered,
    Format,
    Input,
    Reject,
    Span,
    Unreadable,
)
from gristmill.data.raw.inputs import list_inputs, root_of
from gristmill.data.raw.readers.compressed import is_compressed
from gristmill.data.raw.readers.reading import Reading
from gristmill.data.raw.select import Selection
from gristmill.data.storage import Storage
from gristmill.util.errors import UserError

# What is not named here is read as JSON lines.
_READERS = {".json": "json_array", ".parquet": "parquet", ".arrow": "arrow"}
# How parquet files end, the encrypted ones too.
_FOOTERS = (b"PAR1", b"PARE")
# A larger file is looked at before it is read, not only afterwards.
_LARGE_BYTES = 16 << 20


def read_span(
    form: Format,
    root: Storage,
    item: Input,
    span: Span,
    *,
    selection: Selection | None = None,
    check: bool = True,
) -> Iterator[Document]:
    """The documents of a span, in the order of the file, with what could not be read in between.

    Texts above `LONG_BYTES` come as `LongText`, bad documents as `Reject`, those that `selection`
    leaves out as `Filtered`. Raises DataError when the file is damaged, incomplete or cannot be
    read, and, with `check`, when it is not the one that was listed.
    """
    reading = Reading(form, root, item, span, selection)
    read: Callable[[Reading], Iterator[Document]] = importlib.import_module(
        f"gristmill.data.raw.readers.{_reader(form, item.place)}"
    ).read
    with reading.faults():
        if check and item.size > _LARGE_BYTES:
            _compare(root, item)
        yield from read(reading)
        if check:
            _compare(root, item)


def is_parted(form: Format, place: str) -> bool:
    """Whether a file can be read from the middle: whether spans of it cost only themselves."""
    return _reader(form, place) in ("jsonl", "parquet") and not is_compressed(place)


def cut_short(form: Format, root: Storage, inputs: Sequence[Input]) -> list[str]:
    """The parquet files on a disk that lack their end, found without reading them.

    On an object store nobody is asked: each answer takes a request.
    """
    if form.records == "text" or not root.is_local:
        return []
    tables = [item for item in inputs if _reader(form, item.place) == "parquet"]
    return [item.path for item in tables if not _has_footer(root, item)]


def _has_footer(root: Storage, item: Input) -> bool:
    try:
        with open(root.at(item.place), "rb") as file:
            file.seek(max(0, item.size - len(_FOOTERS[0])))
            return file.read() in _FOOTERS
    except OSError:
        return True  # reading it says what is wrong


def _reader(form: Format, place: str) -> str:
    """The module of `readers` for a file."""
    if form.records == "text":
        return "text"
    path = PurePath(place.lower())
    suffix = path.with_suffix("").suffix if is_compressed(place) else path.suffix
    return _READERS.get(suffix, "jsonl")


def _compare(root: Storage, item: Input) -> None:
    """Raise DataError when a file is not what it was when it was listed."""
    found = root.stat(item.place)
    # Not every store has versions.
    if found.size != item.size or (item.version and found.version != item.version):
        raise DataError(
            f"{root.at(item.place)} has changed while it was being prepared. "
            "run the same command again when nothing writes to it.",
            item.path,
            "changed meanwhile",
        )


def documents(
    form: Format,
    root: Storage,
    inputs: Sequence[Input],
    on_reject: Callable[[Reject], None],
    *,
    selection: Selection | None = None,
) -> Iterator[str]:
    """The readable documents of all inputs, in order; very long ones come as several."""
    for number, item in enumerate(inputs):
        span = Span(number, 0, -1)
        for found in read_span(form, root, item, span, selection=selection, check=False):
            if isinstance(found, str):
                yield found
            elif isinstance(found, Reject):
                on_reject(found)
            elif not isinstance(found, Filtered):
                try:
                    yield from found.pieces()
                except Unreadable as error:
                    on_reject(error.reject)


def iter_documents(
    path: str | Path,
    layout: str,
    *,
    pattern: str | None = None,
    text_field: str | None = None,
    separator: str | None = None,
) -> Iterator[str]:
    """The documents of a folder, file or URL that hold text, one after another.

    Raises UserError when there are none, saying why.
    """
    kind = layouts.get(layout)
    inputs = list_inputs(path, pattern or kind.pattern)
    rejects: list[Reject] = []

    def note(reject: Reject) -> None:
        if len(rejects) < 1000:
            rejects.append(reject)

    num_documents = 0
    form = Format(kind.records, text_field or kind.text_field, separator)
    selection = Selection.from_settings(kind.filters) if kind.filters else None
    for text in documents(form, root_of(path), inputs, note, selection=selection):
        if text and not text.isspace():
            num_documents += 1
            yield text
    if num_documents == 0:
        raise UserError(nothing_read(path, len(inputs), rejects))


def nothing_read(path: str | Path | Storage, num_inputs: int, rejects: Sequence[Reject]) -> str:
    """The message for inputs without a single document of text."""
    place = path.root if isinstance(path, Storage) else path
    if not rejects:
        number = f" ({num_inputs:,} files)" if num_inputs > 1 else ""
        return f"{place} holds no text{number}. name other input."
    first = rejects[0]
    detail = f"; {first.detail}" if first.detail else ""
    advice = "name text that is UTF-8, or narrow the pattern (--pattern)."
    if first.reason.startswith(("no field", "field")):
        advice = "name the field that holds the text (--text_field)."
    elif first.reason in ("bad JSON", "not an object"):
        advice = "choose the layout that fits (gristmill prepare list), or narrow the --pattern."
    return f"nothing in {place} could be read ({first.path}: {first.reason}{detail}). {advice}"


def unpacked_bytes(data: bytes, *, gzipped: bool) -> int:
    """Bytes that the beginning of a file unpacks to; 0 where it is damaged (its unit says so)."""
    import zstandard

    try:
        if gzipped:
            return len(zlib.decompressobj(wbits=31).decompress(data))
        return len(zstandard.ZstdDecompressor().decompressobj().decompress(data))
    except (zlib.error, zstandard.ZstdError):
        return 0

"""What raw text is made of: inputs, parts of them, and the documents that come out of reading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from gristmill.util.errors import RunError

LONG_BYTES = 16 << 20
"""A document with more text than this, as its file writes it, is a `LongText`: never held whole."""

OnError = Literal["fail", "skip", "quarantine"]


@dataclass(frozen=True)
class Input:
    """One input file: its normalised path below the root, its place there, bytes and version."""

    path: str
    place: str
    size: int
    version: str = ""
    """Changes when the file does (see `storage.Entry`); not part of a dataset's identity."""


@dataclass(frozen=True)
class Span:
    """A part of an input: the records that begin in bytes `start` to `stop` (-1: the end).

    For a compressed file these are bytes of its text; for parquet the row groups are parted by
    where they begin in the file.
    """

    input: int
    start: int
    stop: int


@dataclass(frozen=True)
class Format:
    """How files part into documents.

    `text`: a file is a document, or several where `separator` is given. `records`: the suffix says
    how: JSON lines, a JSON array, parquet or Arrow; `text_field` names the text, nested as a.b.
    """

    records: Literal["text", "records"]
    text_field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Reject:
    """A document that could not be read, where it is, and why. `detail` helps a person."""

    path: str
    at: int
    """Bytes from the start of the file's text, or for parquet and Arrow the row."""
    reason: str
    detail: str = ""


class Filtered:
    """A document that a filter left out."""


FILTERED = Filtered()


class LongText(Protocol):
    """A document of more than `LONG_BYTES`, in pieces.

    The pieces, joined, are the text. They can be read once, to the end, before the next document
    is asked for. Reading raises `Unreadable` where the text turns out to be bad.
    """

    def pieces(self) -> Iterator[str]:
        """The text in order, a few MB at a time, cut anywhere between two characters."""


class Unreadable(Exception):
    """A long document that cannot be read to its end; what came before is no document either."""

    def __init__(self, reject: Reject) -> None:
        super().__init__(reject.reason)
        self.reject = reject


class DataError(RunError):
    """A file that is damaged, has changed or cannot be read: its unit fails, others go on."""

    def __init__(self, message: str, path: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.path = path
        """The input's normalised path."""
        self.cause = cause
        """What is wrong with it, without where it lies: the same on every machine."""


Document = str | LongText | Reject | Filtered

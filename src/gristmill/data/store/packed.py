"""lit-llama's and TinyLlama's packed files (`LITPKDS`), turned into chunks.

    7 bytes LITPKDS | u64 version | u8 element type | u64 tokens | tokens      (little-endian)

The files of one prefix are one stream of tokens cut anywhere, and the last is filled up with the
separator. Where documents end is not in them, and it is not guessed: a file is one piece of text.

The names tell corpora apart, which training mixes: `arxiv_0000000000.bin`, and with the side and
the process that wrote it `train_slimpajama_7_0000000000.bin`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.data.store.chunks import MAX_CHUNK_TOKENS, ChunkRecord, write_chunk
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"LITPKDS"
_VERSION = 1
_HEADER_BYTES = 24
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_NUMBER = re.compile(r"_\d+$")
_SIDES = {"train": "train", "validation": "val", "val": "val"}
# Per cent of the tokens, as lit-llama's and TinyLlama's trainers have them, by the beginning of a
# set's name. Several sets of one beginning share it by their tokens.
_SHARES = {
    "arxiv": 2.5,
    "book": 4.5,
    "c4": 15.0,
    "common_crawl": 67.0,
    "cc_": 67.0,
    "github": 4.5,
    "stackexchange": 2.0,
    "wikipedia": 4.5,
    "slim": 69.3584,
    "star": 30.6416,
}
# Tokens that are looked at and copied at a time.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class PackedFile:
    """A packed file, and whether it is the last of its prefix."""

    path: Path
    dtype: str
    tokens: int
    last: bool

    @property
    def element(self) -> str:
        """The smallest type of ours that holds its ids."""
        return "uint16" if np.dtype(self.dtype).itemsize <= 2 else "uint32"

    @property
    def corpus(self) -> tuple[str, str]:
        """Its corpus, and which side of it: "train" or "val"; "" for what the name does not say."""
        name = _NUMBER.sub("", _prefix(self.path))
        side, _, rest = name.partition("_")
        return (rest, _SIDES[side]) if side in _SIDES else (name, "")


def shares(tokens: Mapping[str, int]) -> dict[str, float]:
    """Per cent of the training tokens for each corpus, from the tokens that each has.

    As the trainers of packed files mix them; by their tokens where one of them is not known there.
    """
    kinds = {name: next((k for k in _SHARES if name.startswith(k)), "") for name in tokens}
    known = all(kinds.values())
    found = {}
    for name, count in tokens.items():
        alike = [n for n in tokens if not known or kinds[n] == kinds[name]]
        share = (_SHARES[kinds[name]] if known else 100) * count / sum(tokens[n] for n in alike)
        found[name] = max(0.01, round(share, 4))
    return found


def find(folder: Path) -> list[PackedFile]:
    """The packed files in `folder` in their order, those of a prefix one after another.

    Raises UserError when one of them is damaged.
    """
    paths = [path for path in folder.glob("*.bin") if _is_packed(path)]
    # Numbers have leading zeros, and more digits only beyond ten of them.
    paths.sort(key=lambda p: (_prefix(p), len(p.stem), p.stem))
    prefixes = [_prefix(path) for path in paths]
    return [
        _read_header(path, last=prefixes[n + 1 : n + 2] != [prefixes[n]])
        for n, path in enumerate(paths)
    ]


def convert(packed: PackedFile, target: Path, dtype: str) -> ChunkRecord | None:
    """Write the file as a chunk of one piece of text; None when it holds nothing but padding.

    Raises UserError for ids that cannot be.
    """
    # Mapped: only what is copied is read.
    tokens: NDArray[Any] = np.memmap(
        packed.path, _little(packed.dtype), "r", _HEADER_BYTES, (packed.tokens,)
    ).view(np.ndarray)
    if packed.last:
        tokens = tokens[: _without_padding(tokens)]
    if not len(tokens):
        return None
    blocks = _checked(packed.path, tokens, np.iinfo(dtype).max)
    length = np.array([len(tokens)], dtype=np.int64)
    # What it ends with may go on in the next file: nothing says that it does not.
    return write_chunk(target, blocks, length, dtype, continues=not packed.last)


def _is_packed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). mend it or move it away."
        ) from error


def _prefix(path: Path) -> str:
    return _NUMBER.sub("", path.stem)


def _read_header(path: Path, *, last: bool) -> PackedFile:
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    version = int.from_bytes(header[7:15], "little")
    code, tokens = int.from_bytes(header[15:16], "little"), int.from_bytes(header[16:24], "little")
    if len(header) == _HEADER_BYTES and version != _VERSION:
        problem = f"has format version {version}, where only {_VERSION} is known"
    elif len(header) == _HEADER_BYTES and code not in _TYPES:
        problem = f"has elements of type {code}, which are not whole numbers"
    elif tokens > MAX_CHUNK_TOKENS:
        problem = f"holds {tokens:,} tokens, more than the {MAX_CHUNK_TOKENS:,} of a chunk"
    elif (
        len(header) < _HEADER_BYTES
        or path.stat().st_size != _HEADER_BYTES + tokens * np.dtype(_TYPES[code]).itemsize
    ):
        problem = f"is damaged: {path.stat().st_size:,} bytes do not fit its header"
    else:
        return PackedFile(path, _TYPES[code], tokens, last)
    raise UserError(f"{path} {problem}. copy it again, move it away, or prepare the text again.")


def _without_padding(tokens: NDArray[Any]) -> int:
    """Tokens before the run of equal ones at the end, its first one included.

    A run of one is a token; a chunk of nothing else is empty.
    """
    if not len(tokens):
        return 0
    filler, end = tokens[-1], len(tokens)
    while end:
        start = max(0, end - _BLOCK)
        others = np.flatnonzero(tokens[start:end] != filler)
        if len(others):
            return min(len(tokens), start + int(others[-1]) + 2)
        end = start
    return 0


def _checked(path: Path, tokens: NDArray[Any], largest: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high > largest:
            raise UserError(
                f"{path} holds the token id {low if low < 0 else high}, "
                f"which no tokenizer gives (0 to {largest}). prepare the text again."
            )
        yield block


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")

"""Training or validation, by content: the same text lies on the same side in every run.

Documents are parted by a hash of their text, so that exact duplicates stay together whatever file
they are in. Where there are few documents, blocks of them are parted instead, so that a single
novel can be split. Text beyond the first million characters does not count: a long document is
never held whole, and the same text may be long in one file and short in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from gristmill.data.raw.documents import LongText, Unreadable
from gristmill.util.errors import UserError

TRAIN, VAL = 0, 1

FEW_DOCUMENTS = 1000
"""Below this number, blocks are parted instead of documents."""

HEAD_CHARS = 1 << 20
"""The characters of a document that say on which side it lies."""

BLOCK_BYTES = 65536
_SMALLEST_BLOCK_BYTES = 1024
# Smaller blocks for a text that would make only a few large ones.
_BLOCKS_WANTED = 64
# After this many blocks chance does as well as choosing, if it will hold out this many of all.
_ENOUGH_BLOCKS = 1024
_ENOUGH_HELD = 30
_MAX_BLOCKS = 1 << 20


@dataclass(frozen=True)
class Split:
    """Text whose hash is at most `highest` is validation. `block_bytes` 0: whole documents."""

    seed: int
    highest: int
    block_bytes: int

    def side(self, text: str) -> int:
        """The side of a document or block, or of a long document that begins so."""
        if self.highest < 0:
            return TRAIN
        return VAL if content_hash(text, self.seed) <= self.highest else TRAIN

    def sides(self, text: str) -> list[tuple[int, str]]:
        """The parts of a document in order, neighbours on different sides, as (side, text)."""
        if self.highest < 0:
            return [(TRAIN, text)]
        if not self.block_bytes:
            return [(self.side(text[:HEAD_CHARS]), text)]
        runs: list[tuple[int, list[str]]] = []
        for block in blocks(text, self.block_bytes):
            side = self.side(block)
            if runs and runs[-1][0] == side:
                runs[-1][1].append(block)
            else:
                runs.append((side, [block]))
        return [(side, "".join(parts)) for side, parts in runs]

    def long_sides(self, pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
        """The pieces of a long document in order with their sides.

        Where the side changes, another document begins, as with `sides`.
        """
        if self.block_bytes and self.highest >= 0:
            for block in streamed_blocks(pieces, self.block_bytes):
                yield self.side(block), block
            return
        held: list[str] = []
        size, side = 0, None
        for piece in pieces:
            if side is not None:
                yield side, piece
                continue
            held.append(piece)
            size += len(piece)
            if size >= HEAD_CHARS:
                text = "".join(held)
                side = self.side(text[:HEAD_CHARS])
                yield side, text
        if side is None and held:
            text = "".join(held)
            yield self.side(text[:HEAD_CHARS]), text


def content_hash(text: str, seed: int) -> int:
    """64-bit hash of a text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed & (2**64 - 1))


def blocks(text: str, block_bytes: int) -> Iterator[str]:
    """`text` in blocks of about `block_bytes` characters that end at a line or a space."""
    start = 0
    while len(text) - start > block_bytes * 3 // 2:
        end = _block_end(text, start, block_bytes)
        yield text[start:end]
        start = end
    yield text[start:]


def streamed_blocks(pieces: Iterable[str], block_bytes: int) -> Iterator[str]:
    """The blocks of the text that the pieces make, however it is cut into them."""
    left = ""
    for piece in pieces:
        text, start = left + piece, 0
        while len(text) - start > block_bytes * 3 // 2:
            end = _block_end(text, start, block_bytes)
            yield text[start:end]
            start = end
        left = text[start:]
    yield left


def _block_end(text: str, start: int, block_bytes: int) -> int:
    end = start + block_bytes
    for mark in "\n ":
        at = text.rfind(mark, end - block_bytes // 4, end)
        if at >= 0:
            return at + 1
    return end


def plan_split(
    texts: Iterable[str | LongText], fraction: float, seed: int, total_bytes: int
) -> Split:
    """The split that holds out `fraction` of the text.

    With few documents the blocks of lowest hash are chosen, so that at least one is held out and
    one is left. Of many or much, only the first are read. Raises UserError when there is too
    little text to split.
    """
    if fraction == 0:
        return Split(seed, -1, 0)
    by_chance = int(fraction * 2**64) - 1
    size = max(_SMALLEST_BLOCK_BYTES, min(BLOCK_BYTES, total_bytes // _BLOCKS_WANTED))
    sizes: dict[int, int] = {}
    seen = 0
    for number, text in enumerate(texts, 1):
        if number >= FEW_DOCUMENTS:
            return Split(seed, by_chance, 0)
        for block in _readable(text, size):
            hashed = content_hash(block, seed)
            sizes[hashed] = sizes.get(hashed, 0) + len(block)
            seen += len(block)
            if len(sizes) >= _ENOUGH_BLOCKS and _chance_does(
                len(sizes), seen, total_bytes, fraction
            ):
                many = number * total_bytes / seen >= FEW_DOCUMENTS
                return Split(seed, by_chance, 0 if many else size)
    if len(sizes) < 2:
        raise UserError(
            f"there is too little text to hold some out for validation ({total_bytes:,} bytes, "
            f"{len(sizes)} block). add text, or give --val_fraction 0.",
            fix={"--val_fraction": 0},
        )
    return Split(seed, _lowest(sizes, fraction), size)


def _chance_does(num_blocks: int, seen: int, total_bytes: int, fraction: float) -> bool:
    """Whether enough blocks are to come that a share by chance is a good one."""
    expected = num_blocks * max(1.0, total_bytes / seen)
    return expected * min(fraction, 1 - fraction) >= _ENOUGH_HELD or num_blocks > _MAX_BLOCKS


def _readable(text: str | LongText, block_bytes: int) -> Iterator[str]:
    """The blocks of a document, up to where it is unreadable."""
    try:
        pieces = [text] if isinstance(text, str) else text.pieces()
        yield from streamed_blocks(pieces, block_bytes)
    except Unreadable:
        return


def _lowest(sizes: dict[int, int], fraction: float) -> int:
    """The hash up to which blocks make about `fraction` of all, one being left at least."""
    ordered = sorted(sizes)
    wanted, held = fraction * sum(sizes.values()), 0.0
    for hashed in ordered[:-1]:
        held += sizes[hashed]
        if held >= wanted:
            return hashed
    return ordered[-2]

"""Training or validation, by content: the same text lies on the same side in every run.

Documents are parted by a hash of their text, so that exact duplicates stay together whatever file
they are in. Where there are few documents, blocks of them are parted instead, so that a single
novel can be split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from gristmill.util.errors import UserError

TRAIN, VAL = 0, 1

FEW_DOCUMENTS = 1000
"""Below this number, blocks are parted instead of documents."""

BLOCK_BYTES = 65536
_SMALLEST_BLOCK_BYTES = 1024
# Smaller blocks for a text that would make only a few large ones.
_BLOCKS_WANTED = 64
_MAX_BLOCKS = 1 << 20


@dataclass(frozen=True)
class Split:
    """Text whose hash is at most `highest` is validation. `block_bytes` 0: whole documents."""

    seed: int
    highest: int
    block_bytes: int

    def sides(self, text: str) -> list[tuple[int, str]]:
        """The parts of a document in order, neighbours on different sides, as (side, text)."""
        if self.highest < 0:
            return [(TRAIN, text)]
        if not self.block_bytes:
            return [(self._side(text), text)]
        runs: list[tuple[int, list[str]]] = []
        for block in blocks(text, self.block_bytes):
            side = self._side(block)
            if runs and runs[-1][0] == side:
                runs[-1][1].append(block)
            else:
                runs.append((side, [block]))
        return [(side, "".join(parts)) for side, parts in runs]

    def _side(self, text: str) -> int:
        return VAL if content_hash(text, self.seed) <= self.highest else TRAIN


def content_hash(text: str, seed: int) -> int:
    """64-bit hash of a text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed & (2**64 - 1))


def blocks(text: str, block_bytes: int) -> Iterator[str]:
    """`text` in blocks of about `block_bytes` characters that end at a line or a space."""
    start = 0
    while len(text) - start > block_bytes * 3 // 2:
        end = start + block_bytes
        for mark in "\n ":
            at = text.rfind(mark, end - block_bytes // 4, end)
            if at >= 0:
                end = at + 1
                break
        yield text[start:end]
        start = end
    yield text[start:]


def plan_split(texts: Iterable[str], fraction: float, seed: int, total_bytes: int) -> Split:
    """The split that holds out `fraction` of the text.

    With few documents the blocks of lowest hash are chosen, so that at least one is held out and
    one is left. Raises UserError when there is too little text for that.
    """
    if fraction == 0:
        return Split(seed, -1, 0)
    by_chance = int(fraction * 2**64) - 1
    size = max(_SMALLEST_BLOCK_BYTES, min(BLOCK_BYTES, total_bytes // _BLOCKS_WANTED))
    sizes: dict[int, int] = {}
    for number, text in enumerate(texts, 1):
        if number >= FEW_DOCUMENTS:
            return Split(seed, by_chance, 0)
        for block in blocks(text, size):
            hashed = content_hash(block, seed)
            sizes[hashed] = sizes.get(hashed, 0) + len(block)
        if len(sizes) > _MAX_BLOCKS:
            return Split(seed, by_chance, size)
    if len(sizes) < 2:
        raise UserError(
            f"there is too little text to hold some out for validation ({total_bytes:,} bytes, "
            f"{len(sizes)} block). add text, or give --val_fraction 0.",
            fix={"--val_fraction": 0},
        )
    return Split(seed, _lowest(sizes, fraction), size)


def _lowest(sizes: dict[int, int], fraction: float) -> int:
    """The hash up to which blocks make about `fraction` of all, one being left at least."""
    ordered = sorted(sizes)
    wanted, held = fraction * sum(sizes.values()), 0.0
    for hashed in ordered[:-1]:
        held += sizes[hashed]
        if held >= wanted:
            return hashed
    return ordered[-2]

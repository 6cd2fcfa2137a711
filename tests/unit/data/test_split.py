from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.preparation import split as module
from gristmill.data.preparation.split import (
    BLOCK_BYTES,
    VAL,
    Split,
    blocks,
    plan_split,
    streamed_blocks,
)
from gristmill.util.errors import UserError

from .conftest import make_text

NOVEL = make_text(1, 60_000)


def held(split, texts):
    return [part for text in texts for side, part in split.sides(text) if side == VAL]


@settings(max_examples=30)
@given(st.text(max_size=200), st.integers(4, 50))
def test_blocks_are_the_text(text, size):
    found = list(blocks(text, size))
    assert "".join(found) == text
    assert all(len(block) <= size * 3 // 2 for block in found)


def test_blocks_end_at_lines_or_spaces():
    found = list(blocks("aaaa bbbbb\ncccccc ddd eeeeee\nffffff", 12))
    assert found == ["aaaa bbbbb\n", "cccccc ddd ", "eeeeee\nffffff"]
    assert list(blocks("x" * 30, 12)) == ["x" * 12, "x" * 18]


@settings(max_examples=30)
@given(st.lists(st.text(alphabet="ab \n", max_size=60), max_size=20), st.integers(4, 50))
def test_blocks_do_not_depend_on_the_pieces_a_text_comes_in(pieces, size):
    assert list(streamed_blocks(pieces, size)) == list(blocks("".join(pieces), size))


@pytest.mark.parametrize("piece", [1, 1000, 100_000, 10**7])
@pytest.mark.parametrize("split", [Split(1, 2**63, 4096), Split(1, 2**63, 0), Split(1, -1, 4096)])
def test_a_long_document_is_split_as_a_whole_one(monkeypatch, split, piece):
    monkeypatch.setattr(module, "HEAD_CHARS", 1000)
    pieces = (NOVEL[at : at + piece] for at in range(0, len(NOVEL), piece))
    found = groupby(split.long_sides(pieces), key=lambda part: part[0])
    assert [(side, "".join(text for _, text in run)) for side, run in found] == split.sides(NOVEL)


def test_a_long_document_goes_by_its_beginning(monkeypatch):
    monkeypatch.setattr(module, "HEAD_CHARS", 1000)
    split = Split(1, 2**63, 0)
    for n in range(10):
        text = f"{n} {NOVEL}"
        sides = {side for side, _ in split.long_sides([text[:700], text[700:5000], text[5000:]])}
        assert sides == {split.side(text[:1000])}


def test_a_single_novel_is_split():
    split = plan_split([NOVEL], 0.05, 1, len(NOVEL))
    parts = split.sides(NOVEL)
    assert "".join(text for _, text in parts) == NOVEL
    assert [a for a, _ in parts] != [b for b, _ in parts[1:]]
    size = sum(map(len, held(split, [NOVEL])))
    assert 0.03 < size / len(NOVEL) < 0.10


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
def test_both_sides_get_something_of_a_small_text(fraction):
    text = make_text(2, 1500)
    size = sum(map(len, held(plan_split([text], fraction, 1, len(text)), [text])))
    assert 0 < size < len(text)


def test_of_a_very_large_text_the_beginning_tells_how_it_is_split():
    read = 0

    def books():
        nonlocal read
        for n in range(900):
            read = n
            yield NOVEL.replace("\n", f"\n{n} ")

    few = plan_split(books(), 0.1, 1, 400 * len(NOVEL))
    assert (few.block_bytes, few.highest) == (BLOCK_BYTES, int(0.1 * 2**64) - 1)
    assert read < 300
    many = plan_split(books(), 0.1, 1, 4000 * len(NOVEL))
    assert (many.block_bytes, many.highest) == (0, few.highest)
    # So small a share must be chosen among all.
    plan_split(books(), 0.0001, 1, 900 * len(NOVEL))
    assert read == 899


def test_many_documents_are_parted_whole_and_duplicates_together():
    texts = [f"document {n % 4000}" for n in range(8000)]
    split = plan_split(iter(texts), 0.1, 1, 10**9)
    assert split.block_bytes == 0
    sides = {}
    for text in texts:
        ((side, same),) = split.sides(text)
        assert same == text
        assert sides.setdefault(text, side) == side
    assert 300 < sum(side == VAL for side in sides.values()) < 500


def test_the_seed_changes_the_split():
    texts = [f"document {n}" for n in range(2000)]
    one, two = (set(held(plan_split(texts, 0.1, seed, 10**9), texts)) for seed in (1, 2))
    assert one != two


def test_large_texts_have_large_blocks():
    assert plan_split(["a b"] * 10, 0.0, 1, 10**9).highest < 0
    split = plan_split([NOVEL] + [f"{n} {NOVEL[n:]}" for n in range(12)], 0.01, 1, 10**9)
    assert split.block_bytes == BLOCK_BYTES


def test_too_little_text_is_refused():
    with pytest.raises(
        UserError, match=r"too little text .*5 bytes, 1 block.*--val_fraction 0"
    ) as e:
        plan_split(["short"], 0.1, 1, 5)
    assert e.value.fix == {"--val_fraction": 0}

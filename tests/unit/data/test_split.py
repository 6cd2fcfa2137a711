from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.split import BLOCK_BYTES, VAL, blocks, plan_split
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

from __future__ import annotations

import pytest

from gristmill.data import layouts
from gristmill.util.errors import UserError


@pytest.mark.parametrize(
    ("layout", "bos", "eos", "bos_id", "eos_id", "expected"),
    [
        ("textfiles", "auto", "auto", 1, 2, (1, None)),
        ("textfiles", "auto", "auto", None, 2, (None, 2)),
        ("textfiles", "auto", "auto", None, None, (None, None)),
        ("textfiles", "none", "auto", 1, 2, (None, 2)),
        ("textfiles", "auto", 7, 1, 2, (1, 7)),
        ("jsonl", "auto", "auto", 1, 2, (1, 2)),
        ("jsonl", "auto", "auto", None, 2, (None, 2)),
        ("jsonl", "auto", "auto", 0, 0, (None, 0)),  # one token for both
        ("jsonl", "auto", "none", 1, 2, (1, None)),
        ("jsonl", "none", "none", 1, 2, (None, None)),
        ("jsonl", 5, 5, 1, 2, (5, 5)),
    ],
)
def test_what_frames_a_document(layout, bos, eos, bos_id, eos_id, expected):
    found = layouts.frame(
        layouts.get(layout), bos=bos, eos=eos, bos_id=bos_id, eos_id=eos_id, num_token_ids=9
    )
    assert (found.bos_id, found.eos_id) == expected


@pytest.mark.parametrize(("option", "value"), [("bos", 9), ("eos", -1)])
def test_an_id_must_be_the_tokenizers(option, value):
    options = {"bos": "auto", "eos": "auto"} | {option: value}
    with pytest.raises(UserError, match=rf"--{option} {value} is no id .*0 to 8"):
        layouts.frame(layouts.get("jsonl"), **options, bos_id=None, eos_id=None, num_token_ids=9)


def test_names_and_unknown_names():
    assert layouts.names() == ["textfiles", "jsonl"]
    with pytest.raises(UserError, match=r"unknown layout 'jsonlines'.*prepare list"):
        layouts.get("jsonlines")

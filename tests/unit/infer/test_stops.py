import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.infer.stops import StopText


def shown(stops, pieces):
    """What was let through, and whether it was stopped."""
    stop = StopText(stops)
    text = "".join([stop.put(piece) for piece in pieces])
    return text + stop.flush(), stop.stopped


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "all of it", ("all of it", False)),
        ([""], "all of it", ("all of it", False)),
        (["\n\n"], "one\ntwo\n\nthree", ("one\ntwo", True)),
        (["User:"], "Use", ("Use", False)),
        (["ab"], "aab", ("a", True)),
        # The first to be complete ends the text; of two at once the longer.
        (["abc", "b"], "xabc", ("xa", True)),
        (["c", "abc"], "xabc", ("x", True)),
        (["é"], "caf\u00e9", ("caf", True)),
    ],
)
def test_text_up_to_a_stop(stops, text, expected):
    assert shown(stops, [text]) == expected
    assert shown(stops, text) == expected


def test_only_what_may_begin_a_stop_is_withheld():
    stop = StopText(["###", "##!"])
    assert stop.put("ab#") == "ab"
    assert stop.put("#") == ""
    assert stop.put("x") == "##x"
    assert stop.put("#") == ""
    assert not stop.stopped
    assert stop.flush() == "#"


def test_nothing_comes_after_a_stop():
    stop = StopText(["."])
    assert stop.put("one. two") == "one"
    assert stop.stopped
    assert stop.put("more") == stop.flush() == ""


@given(
    st.lists(st.text("ab", max_size=4), max_size=3),
    st.text("ab", max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_pieces_make_no_difference(stops, text, cuts):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert shown(stops, pieces) == shown(stops, [text]) == shown(stops, text)
    whole, stopped = shown(stops, [text])
    assert text.startswith(whole)
    assert stopped == any(stop in text for stop in stops if stop)
    assert not any(stop in whole for stop in stops if stop)


def test_long_stops_cost_little():
    stop = StopText(["a" * 999 + "b"] * 16)
    start = time.perf_counter()
    text = "".join(stop.put("a") for _ in range(3000))
    assert text == "a" * (3000 - 999)
    assert time.perf_counter() - start < 1

from __future__ import annotations

import numpy as np
import pytest

from gristmill.data.raw.select import MISSING, Selection, load_map, look_up
from gristmill.util.errors import RunError, UserError

RECORD = {
    "lang": "en",
    "score": 3,
    "flag": True,
    "none": None,
    "list": ["en"],
    "meta": {"set": "Wiki", "deep": {"n": 0.5}, "a.b": 1},
    "x.y": 7,
}


def keeps(filters, record=None) -> bool:
    return Selection.from_settings(filters).keep(RECORD if record is None else record)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "de"}, False),
        ({"meta.set": "Wiki", "meta.deep.n": 0.5}, True),
        ({"meta.set": "Wiki", "lang": "de"}, False),
        ({"meta.a.b": 1, "x.y": 7}, True),
        ({"lang": {"in": ["de", "en"]}}, True),
        ({"lang": {"in": []}}, False),
        ({"lang": {"not_in": ["de"]}}, True),
        ({"lang": {"not_in": ["de", "en"]}}, False),
        ({"score": {"min": 3}}, True),
        ({"score": {"min": 3.5}}, False),
        ({"score": {"min": 1, "max": 2}}, False),
        ({"score": {"max": 3, "not_in": [2]}}, True),
        ({"lang": {"min": "en", "max": "eo"}}, True),
        # Kinds that cannot be compared are left out.
        ({"lang": {"min": 1}}, False),
        ({"score": {"min": "1"}}, False),
        ({"flag": {"min": 0}}, False),
        ({"list": "en"}, False),
        ({"list": {"not_in": ["en"]}}, True),
        ({"flag": True}, True),
        ({"flag": 1}, False),
        ({"score": {"in": [3.0]}}, True),
        # Missing: kept by not_in only. Null is a value.
        ({"nowhere": "x"}, False),
        ({"nowhere": None}, False),
        ({"nowhere": {"min": 0}}, False),
        ({"nowhere": {"not_in": ["x"]}}, True),
        ({"meta.set.deeper": {"not_in": ["x"]}}, True),
        ({"none": None}, True),
        ({"none": {"not_in": [None]}}, False),
        ({"none": {"max": 3}}, False),
    ],
)
def test_filters(filters, kept):
    assert keeps(filters) is kept


def test_fields():
    assert Selection.from_settings({"a.b": 1, "c": {"min": 2}}).fields == {"a.b", "c"}


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"a": ["x"]}, "the filter of 'a' is a list"),
        ({"a": {"under": 3}}, "unknown operator 'under'. use in, not_in, min, max"),
        ({"a": {}}, "has no operator. use in"),
        ({"a": {"in": "x"}}, "needs a list of values, not 'x'"),
        ({"a": {"in": [{"b": 1}]}}, "compare with texts, numbers"),
        ({"a": {"min": None}}, "has the bound None"),
        ({"a": {"max": True}}, "has the bound True"),
    ],
)
def test_bad_filters(filters, says):
    with pytest.raises(UserError, match=says):
        Selection.from_settings(filters)


def test_look_up():
    assert look_up({"a": {"b": None}}, "a.b") is None
    assert look_up({"a": {"b.c": 2}}, "a.b.c") == 2
    assert look_up({"a.b": {"c": 3}}, "a.b.c") == 3
    assert look_up({"a": {"c": 1}, "a.b": {"c": 3}}, "a.b.c") == 3
    assert look_up({"a": "text"}, "a.b") is MISSING
    assert look_up([1], "a") is MISSING


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_map.py").write_text(
        "import numpy as np\n"
        "VALUE = 3\n"
        "def mixed(texts):\n"
        "    return [True, False, None, texts[3].upper()]\n"
        "def mask(texts):\n"
        "    return np.array([len(t) > 1 for t in texts])\n"
        "def short(texts):\n"
        "    return texts[1:]\n"
        "def wrong(texts):\n"
        "    return [1 for _ in texts]\n"
        "def nothing(texts):\n"
        "    texts.clear()\n"
        "def lazy(texts):\n"
        "    return (t for t in texts)\n"
        "def broken(texts):\n"
        "    raise KeyError('boom')\n"
    )
    (tmp_path / "my_broken.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("module")
def test_map():
    assert load_map("my_map:mixed")(["a", "b", "c", "d"]) == ["a", None, None, "D"]
    assert load_map("my_map:mask")(["a", "bb"]) == [None, "bb"]
    assert np.array([True]).tolist() == [True]


@pytest.mark.usefixtures("module")
def test_answers_of_another_kind_name_the_function():
    with pytest.raises(RunError, match="my_map:short answered 2 texts with 1"):
        load_map("my_map:short")(["a", "b"])
    with pytest.raises(RunError, match="my_map:wrong returned int for a text"):
        load_map("my_map:wrong")(["a"])
    with pytest.raises(RunError, match="my_map:nothing answered 1 texts with NoneType"):
        load_map("my_map:nothing")(["a"])
    failed = r"my_map:broken failed \(KeyError: 'boom'; .*my_map.py, line 16\)"
    with pytest.raises(RunError, match=failed):
        load_map("my_map:broken")(["a"])
    with pytest.raises(RunError, match="answered 1 texts with generator"):
        load_map("my_map:lazy")(["a"])


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("my_map", "names no function"),
        ("my_map:other", "cannot be loaded .AttributeError"),
        ("my_broken:f", "cannot be loaded .ModuleNotFoundError: No module named 'not_there'"),
        ("my_map:VALUE", "is no function but int"),
    ],
)
def test_no_such_function(spec, says):
    with pytest.raises(UserError, match=says):
        load_map(spec)

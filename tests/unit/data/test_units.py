"""Units over sources of these tests' own: what is read is a list, so that only units are tried."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gristmill.data.preparation import split, units
from gristmill.data.preparation.plan import Plan, Recipe, Units
from gristmill.data.preparation.split import Split
from gristmill.data.preparation.units import UnitRecord, chunk_name, joins, read_record, run_unit
from gristmill.data.raw import documents, sources
from gristmill.data.raw.documents import FILTERED, DataError, Input, Reject, Unreadable
from gristmill.data.storage import Storage
from gristmill.data.store.chunks import ChunkRecord, map_chunk
from gristmill.tokenizer import long_text
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

from .conftest import make_text

BAD = Reject("a.txt", 5, "bad JSON", "here")


class Long:
    """A long document; `bad`: how many pieces come before it turns out to be unreadable."""

    def __init__(self, text: str, piece: int = 999, bad: int | None = None) -> None:
        self._text, self._piece, self._bad = text, piece, bad
        self.left = True

    def pieces(self):
        assert self.left, "read twice"
        self.left = False
        for number, at in enumerate(range(0, len(self._text), self._piece)):
            if number == self._bad:
                raise Unreadable(BAD)
            yield self._text[at : at + self._piece]


WHOLE = Split(1, -1, 0)


class World:
    """Inputs as lists of documents, and units that read them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.files: dict[str, list] = {}
        self.num = 0
        patch.setattr(sources, "read_span", self.read_span)

    def read_span(self, form, root, item, span, *, selection=None, check=True):
        assert check, "units must see that a file has changed"
        for document in self.files[item.path]:
            if isinstance(document, Exception):
                raise document
            yield document() if callable(document) else document
            # All that is read of a long document is read before the next is asked for.

    def recipe(self, **options) -> Recipe:
        settings = {
            "layout": "textfiles",
            "tokenizer": "t",
            "num_token_ids": self.tokenizer.num_token_ids,
            "bos_id": 0,
            "eos_id": 1,
            "dtype": "uint16",
            "chunk_tokens": 2048,
            "seed": 1,
        }
        return Recipe(**settings | options)

    def plan(self, files, cut=WHOLE, val_inputs=(), **options) -> Plan:
        self.files = dict(files)
        inputs = tuple(Input(name, name, 10_000) for name in self.files)
        spans = np.array([(n, 0, -1) for n in range(len(inputs))], dtype=np.int64)
        one = Units(np.array([0, len(inputs)], dtype=np.int64), spans)
        return Plan(self.recipe(**options), inputs, one, cut, frozenset(val_inputs))

    def run(self, plan: Plan, on_error="skip", engine=None):
        self.num += 1
        self.out = self.folder / str(self.num)
        self.out.mkdir()
        self.seen = []
        return run_unit(
            plan,
            0,
            Storage("/nowhere"),
            engine or self.tokenizer,
            self.out,
            lambda progress: self.seen.append(replace(progress)),
            on_error,
        )

    def tokens(self, record: UnitRecord, number: int = 0) -> list[int]:
        parts = record.splits[number].parts
        mapped = [map_chunk(self.out / part.name, part, "uint16") for part in parts]
        return [t for m in mapped for t in m.tokens.tolist()]

    def documents(self, record: UnitRecord, number: int = 0) -> list[str]:
        """The texts of a split, as its own document index has them."""
        found, begun = [], []
        for part in record.splits[number].parts:
            mapped = map_chunk(self.out / part.name, part, "uint16")
            starts = np.concatenate([[0], mapped.ends[:-1]])
            for n, (a, b) in enumerate(zip(starts, mapped.ends, strict=True)):
                begun += mapped.tokens[a:b].tolist()
                if not (part.continues and n == len(mapped.ends) - 1):
                    assert (begun[0], begun[-1]) == (0, 1)
                    found.append(self.tokenizer.decode(begun[1:-1], skip_special=False))
                    begun = []
        assert not begun
        return found


@pytest.fixture
def world(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(long_text, "MAX_TEXT_BYTES", 4_000)
    monkeypatch.setattr(long_text, "MAX_CALL_BYTES", 2_000)
    return World(tmp_path, Tokenizer.load(tokenizer_dir), monkeypatch)


TEXTS = [make_text(n, 5 + 37 * n % 400) for n in range(60)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_out_framed_and_shuffled(world):
    record = world.run(world.plan({"a.txt": TEXTS[:30], "b.txt": TEXTS[30:]}))
    found = world.documents(record)
    assert sorted(found) == sorted(TEXTS)
    assert found != TEXTS
    assert record.splits[0].text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert record.documents == 60
    assert read_record(world.out) == record == UnitRecord.from_json(record.to_json())
    last = world.seen[-1]
    assert (last.documents, last.text_bytes) == (60, record.splits[0].text_bytes)
    assert last.tokens == record.tokens - 2 * 60
    assert all(part.tokens <= 2048 for part in record.splits[0].parts)


def test_batches_do_not_show(world, monkeypatch):
    plan = world.plan({"a.txt": TEXTS})
    world.run(plan)
    first = bytes_of(world.out)
    monkeypatch.setattr(units, "_BATCH_TEXTS", 7)
    world.run(plan)
    assert bytes_of(world.out) == first


def test_blocks_bound_what_is_gathered(world, monkeypatch):
    monkeypatch.setattr("gristmill.data.preparation.parts._BLOCK_TOKENS", 3_000)
    monkeypatch.setattr(units, "_BATCH_TEXTS", 5)
    record = world.run(world.plan({"a.txt": TEXTS}))
    found = world.documents(record)
    assert sorted(found) == sorted(TEXTS)
    assert set(found[:5]) < set(TEXTS[:30])  # near where they were


@pytest.mark.parametrize("frame", [(0, 1), (None, 1), (0, None), (None, None)])
def test_frames(world, frame):
    plan = world.plan({"a.txt": ["one", "", "two words", " \n"]}, bos_id=frame[0], eos_id=frame[1])
    record = world.run(plan)
    around = [
        [i for i in (frame[0], *world.tokenizer.encode(text), frame[1]) if i is not None]
        for text in ("one", "two words")
    ]
    assert world.tokens(record) in (around[0] + around[1], around[1] + around[0])
    assert record.empty_documents == 2
    assert record.documents == 2


LONG = make_text(99, 20_000)


@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize("piece", [100, 5_000, 10**7])
def test_a_long_document_has_the_tokens_of_a_whole_one(world, piece, bos):
    whole = world.run(world.plan({"a.txt": [LONG]}, bos_id=bos))
    expected = bytes_of(world.out)
    assert len(whole.splits[0].parts) > 5
    record = world.run(world.plan({"a.txt": [Long(LONG, piece)]}, bos_id=bos))
    assert record == whole
    assert bytes_of(world.out) == expected
    assert world.seen[-1].tokens == whole.tokens - 1 - (bos is not None)


def test_long_documents_lie_among_others(world):
    files = {"a.txt": [*TEXTS[:20], Long(LONG), *TEXTS[20:], Long(LONG[7:])]}
    record = world.run(world.plan(files))
    assert sorted(world.documents(record)) == sorted([*TEXTS, LONG, LONG[7:]])
    assert record.documents == 62


def test_a_long_document_is_never_gathered(world, monkeypatch):
    monkeypatch.setattr(units, "_BATCH_CHARS", 3_000)
    sizes = []

    class Counting:
        cutter = world.tokenizer.cutter

        def encode_batch(self, texts):
            sizes.append(sum(map(len, texts)))
            return world.tokenizer.encode_batch(texts)

    world.run(world.plan({"a.txt": [Long(LONG)]}), engine=Counting())
    assert max(sizes) < 10_000
    assert len(world.seen) > 10


@pytest.mark.parametrize("cut", [Split(1, -1, 0), Split(1, 2**63, 0), Split(1, 2**63, 1024)])
def test_a_bad_long_document_leaves_no_trace(world, cut):
    options = {"cut": cut, "val_fraction": 0.5 if cut.highest > 0 else 0.0}
    bad = [*TEXTS[:20], Long(LONG, bad=30), *TEXTS[20:], Long(LONG, bad=0)]
    record = world.run(world.plan({"a.txt": bad}, **options))
    named = {part.name for side in record.splits for part in side.parts}
    assert {path.name for path in world.out.iterdir()} == named | {units.RECORD, units.REJECTS}
    assert record.rejects == {"bad JSON": 2}
    assert world.seen[-1].rejects >= 1
    sides = range(len(record.splits))
    found = [sorted(world.documents(record, side)) for side in sides]
    good = world.run(world.plan({"a.txt": TEXTS}, **options))
    assert found == [sorted(world.documents(good, side)) for side in sides]
    assert [s.text_bytes for s in record.splits] == [s.text_bytes for s in good.splits]
    assert record.documents == good.documents


def test_a_long_document_without_text_is_empty(world):
    record = world.run(world.plan({"a.txt": ["one", Long(" \n" * 5_000)]}))
    assert (record.documents, record.empty_documents) == (1, 1)
    assert world.documents(record) == ["one"]


def test_what_the_tokenizer_cannot_take_is_rejected(world, monkeypatch):
    monkeypatch.setattr(long_text, "MAX_UNCUT_BYTES", 3_000)
    monkeypatch.setattr(units, "MAX_UNCUT_BYTES", 3_000)
    stretch = "x" * 9_000
    files = {"a.txt": ["one"], "b.txt": [stretch, LONG, Long("Begins well " + stretch), "two"]}
    record = world.run(world.plan(files))
    assert sorted(world.documents(record)) == sorted(["one", "two", LONG])
    assert record.rejects == {"too long for this tokenizer": 2}
    listed = [json.loads(line) for line in (world.out / units.REJECTS).read_text().splitlines()]
    assert [item["path"] for item in listed] == ["b.txt", "b.txt"]
    assert "Begins well" in listed[1]["detail"]


def test_long_documents_are_parted_in_the_same_blocks(world):
    cut = Split(1, 2**62, 1024)
    options = {"cut": cut, "val_fraction": 0.2}
    whole = world.run(world.plan({"a.txt": [LONG]}, **options))
    expected = [sorted(world.documents(whole, side)) for side in (0, 1)]
    assert min(map(len, expected)) > 10
    record = world.run(world.plan({"a.txt": [Long(LONG, 777)]}, **options))
    assert [sorted(world.documents(record, side)) for side in (0, 1)] == expected
    assert [s.text_bytes for s in record.splits] == [s.text_bytes for s in whole.splits]


def test_whole_long_documents_go_by_their_beginning(world, monkeypatch):
    monkeypatch.setattr(split, "HEAD_CHARS", 500)
    cut = Split(1, 2**63, 0)
    texts = [f"{n} {LONG[:3_000]}" for n in range(20)]
    files = {"a.txt": [Long(text, 300 + 17 * n) for n, text in enumerate(texts)]}
    record = world.run(world.plan(files, cut=cut, val_fraction=0.5))
    expected = [[t for t in texts if cut.side(t[:500]) == side] for side in (0, 1)]
    assert min(map(len, expected)) > 3
    assert [sorted(world.documents(record, side)) for side in (0, 1)] == list(map(sorted, expected))


def test_files_may_say_what_is_validation(world):
    files = {"a.txt": TEXTS[:20], "b.txt": [*TEXTS[20:40], Long(LONG)], "c.txt": TEXTS[40:]}
    plan = world.plan(files, val_inputs=[1], val_pattern="b.txt")
    record = world.run(plan)
    assert sorted(world.documents(record, 1)) == sorted([*TEXTS[20:40], LONG])
    assert sorted(world.documents(record, 0)) == sorted([*TEXTS[:20], *TEXTS[40:]])


def test_rejects_are_counted_and_listed(world):
    record = world.run(world.plan({"a.txt": [BAD, "one", FILTERED, BAD]}))
    assert (record.rejects, record.filtered, record.documents) == ({"bad JSON": 2}, 1, 1)
    first, _ = (world.out / units.REJECTS).read_text().splitlines()
    assert json.loads(first) == {"path": "a.txt", "at": 5, "reason": "bad JSON", "detail": "here"}


@pytest.mark.parametrize("document", [BAD, Long(LONG, bad=3)])
def test_fail_ends_at_the_first_bad_document(world, document):
    with pytest.raises(UserError, match=r"a\.txt cannot be prepared, at 5: bad JSON; here") as e:
        world.run(world.plan({"a.txt": ["one", document]}), on_error="fail")
    assert e.value.fix == {"--on_error": "skip"}


def test_quarantine_leaves_damaged_files_out(world):
    broken = DataError("it is torn", "b.txt")
    files = {"a.txt": TEXTS[:20], "b.txt": [*TEXTS[20:30], broken], "c.txt": [*TEXTS[30:], BAD]}
    with pytest.raises(DataError, match="torn"):
        world.run(world.plan(files))
    record = world.run(world.plan(files), on_error="quarantine")
    found = world.documents(record)
    assert sorted(found) == sorted([*TEXTS[:20], *TEXTS[30:]])
    (lost,) = record.quarantined
    assert (lost.path, lost.text_bytes) == ("b.txt", 10_000)
    assert record.rejects == {"bad JSON": 1}
    assert UnitRecord.from_json(record.to_json()) == record
    assert "b.txt" in (world.out / units.REJECTS).read_text()


def test_quarantine_of_everything_leaves_an_empty_unit(world):
    files = {"a.txt": [DataError("torn", "a.txt")], "b.txt": ["x", DataError("torn", "b.txt")]}
    record = world.run(world.plan(files), on_error="quarantine")
    assert record.splits[0].parts == ()
    assert [lost.path for lost in record.quarantined] == ["a.txt", "b.txt"]


def test_the_users_function(world, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def shout(texts):\n"
        "    return [None if 'no' in t else t.upper() if 'yes' in t else t for t in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    files = {"a.txt": ["yes", "no", "same", Long("yes " * 2_000)], "b.txt": [Long("no " * 2_000)]}
    record = world.run(world.plan(files, map="mine:shout"))
    assert sorted(world.documents(record)) == sorted(["YES", "same", "YES " * 2_000])
    assert record.filtered == 2


def test_a_bad_long_document_never_reaches_the_users_function(world, tmp_path, monkeypatch):
    (tmp_path / "same.py").write_text("def same(texts):\n    return texts\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = {"a.txt": ["one", Long(LONG, bad=2), "two"]}
    record = world.run(world.plan(files, map="same:same"))
    assert (record.documents, record.rejects) == (2, {"bad JSON": 1})


def test_a_slice_to_try(world, monkeypatch):
    monkeypatch.setattr(units, "FAST_DEV_BYTES", 3_000)
    files = {"a.txt": TEXTS, "b.txt": [Long(LONG), "never read"], "c.txt": ["short"]}
    record = world.run(world.plan(files, fast_dev_run=True))
    found = world.documents(record)
    assert LONG[:1000] in found
    assert "short" in found
    assert "never read" not in found
    assert sum(len(text) for text in found) == 2_005


def test_an_id_above_the_tokenizers_is_an_error(world):
    plan = world.plan({"a.txt": TEXTS}, num_token_ids=100)
    with pytest.raises(RunError, match=r"gave id \d+, above its largest \(99\)"):
        world.run(plan)


def chunk(tokens: int, continues: bool = False) -> ChunkRecord:
    return ChunkRecord("x", tokens, 1, tokens * 2, "0", continues)


def test_small_parts_are_joined_but_for_pieces_of_a_document():
    parts = [chunk(100), chunk(300), chunk(10, True), chunk(10), chunk(249), chunk(250)]
    assert joins(parts, 1000) == [True, False, False, False, True, False]
    assert joins([], 1000) == []
    assert chunk_name(12, 3) == "chunk-0000012-3.bin"


def test_long_is_what_the_documents_module_says():
    assert documents.LONG_BYTES >= 4 * split.HEAD_CHARS

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest

from gristmill.data.preparation import finalize as module
from gristmill.data.preparation.finalize import finalize
from gristmill.data.preparation.plan import Plan, Recipe, Units
from gristmill.data.preparation.split import Split
from gristmill.data.preparation.units import REJECTS, Quarantined, SplitRecord, UnitRecord
from gristmill.data.preparation.workspace import LocalWorkspace
from gristmill.data.raw.documents import Input
from gristmill.data.storage import Storage
from gristmill.data.store import manifest, verify
from gristmill.data.store.chunks import write_chunk
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.engines import EngineChoice
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

from .conftest import tree
from .made_datasets import documents_of

CHUNK_TOKENS = 1024
ENGINE = EngineChoice("tokenizers", "0.23", "definition")

# Tokens of a part: large enough to be a chunk, and to be joined with others.
BIG, SMALL = 600, 90


@pytest.fixture
def make(tokenizer_dir, tmp_path):
    """A job whose units are committed; calling it again makes the same one elsewhere."""
    tokenizer = Tokenizer.load(tokenizer_dir)

    def job(name, sides, *, val=True, cuts=(), rejects=(), quarantined=(), filtered=0):
        """`sides`: for each unit, for each split, lengths of its parts of one document."""
        recipe = Recipe(
            layout="jsonl",
            records="records",
            filters={"meta.set": {"not_in": ["a"]}},
            tokenizer=tokenizer.digest,
            num_token_ids=tokenizer.num_token_ids,
            bos_id=0,
            eos_id=None,
            dtype="uint16",
            chunk_tokens=CHUNK_TOKENS,
            val_fraction=0.5 if val else 0.0,
            seed=1,
        )
        inputs = tuple(Input(f"{n}.jsonl", f"{n}.jsonl", 1000, "v") for n in range(len(sides)))
        spans = np.array([(n, 0, -1) for n in range(len(sides))])
        units = Units(np.arange(len(sides) + 1), spans)
        plan = Plan(recipe, inputs, units, Split(1, 5, 0))
        space = LocalWorkspace(Storage(tmp_path / name))
        with space.locked():
            space.start(plan, ENGINE, tokenizer)
            for unit, splits in enumerate(sides):
                lost = tuple(Quarantined(f"{unit}.jsonl", "damaged", b) for b in quarantined)
                commit(space, plan, unit, splits, cuts, rejects, lost, filtered)
        return plan, space

    return job


def commit(space, plan, unit, splits, cuts, rejects, quarantined, filtered):
    with space.writing(unit, plan) as folder:
        made = []
        for number, lengths in enumerate(splits):
            parts = []
            for index, length in enumerate(lengths):
                tokens = 100 * unit + 10 * number + index + np.zeros(length, dtype=np.int64)
                path = folder / f"{plan.recipe.splits[number] or 'all'}-{index}.bin"
                cut = (unit, number, index) in cuts
                one = write_chunk(path, [tokens], np.array([length]), "uint16", continues=cut)
                parts.append(one)
            made.append(SplitRecord(len(lengths), 5 * sum(lengths), tuple(parts)))
        reasons = {"not JSON": len(rejects)} if rejects else {}
        record = UnitRecord(unit, tuple(made), reasons, 2, filtered, quarantined)
        lines = [{"path": f"{unit}.jsonl", "at": at, "reason": "not JSON"} for at in rejects]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / REJECTS).write_text(text)
        (folder / "unit.json").write_text(record.to_json())


SIDES = [([BIG, SMALL], [50]), ([BIG, BIG], [60, 70]), ([SMALL], []), ([SMALL, BIG], [80])]


def run(plan, space, limit=0.001):
    with space.locked():
        return finalize(plan, ENGINE, space, limit)


def test_large_parts_stay_and_small_ones_are_joined_in_order(make, tmp_path):
    plan, space = make("out", SIDES, rejects=[5], filtered=3)
    made = run(plan, space, 1.0)
    space.close()
    train, val = Dataset.open(tmp_path / "out" / "train"), Dataset.open(tmp_path / "out" / "val")
    assert {"train": train.manifest, "val": val.manifest} == made
    assert [(c.name, c.tokens, c.documents) for c in train.chunks] == [
        ("chunk-0000000-0.bin", BIG, 1),
        ("chunk-0000000-1.bin", 3 * SMALL, 3),
        ("chunk-0000001-0.bin", BIG, 1),
        ("chunk-0000001-1.bin", BIG, 1),
        ("chunk-0000003-1.bin", BIG, 1),
    ]
    assert [d[0] for d in documents_of(train)] == [0, 1, 200, 300, 100, 101, 301]
    assert [d[0] for d in documents_of(val)] == [10, 110, 111, 310]
    assert [len(d) for d in documents_of(val)] == [50, 60, 70, 80]
    source = train.manifest.source
    assert source.rejects == {"not JSON": 4}
    assert (source.filtered, source.empty_documents, source.split) == (12, 8, "train")
    assert source.filters == {"meta.set": {"not_in": ["a"]}}
    assert train.manifest.totals.documents == 7
    assert train.manifest.totals.text_bytes == 5 * train.num_tokens
    listed = (tmp_path / "out" / "train" / REJECTS).read_text().splitlines()
    assert [json.loads(line)["path"] for line in listed] == [f"{n}.jsonl" for n in range(4)]
    assert verify.problems(train.path) == verify.problems(val.path) == []
    assert set(tree(tmp_path / "out" / "val")) == {
        *("README.md", "chunk-0000000-0.bin", "chunks.npy", "index.json", "manifest.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    }


def test_joined_chunks_are_full_at_most_and_cut_documents_are_never_moved(make, tmp_path):
    sides = [([250, 250], []), ([250, 250], []), ([1024, 100, 30], []), ([250], [9])]
    plan, space = make("out", sides, cuts={(2, 0, 0)})
    run(plan, space)
    chunks = list(Dataset.open(tmp_path / "out" / "train").chunks)
    assert [(c.tokens, c.documents, c.continues) for c in chunks] == [
        (1000, 4, False),
        (1024, 1, True),
        (100, 1, False),
        (280, 2, False),
    ]


@pytest.mark.parametrize(
    "stage", ["place", "write_chunk", "index_json", "chunks.npy", "README.md", "manifest.json"]
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_killed_finalize_is_finished_by_the_next(make, tmp_path, monkeypatch, stage, after):
    plan, space = make("reference", SIDES)
    run(plan, space)
    space.close()
    plan, space = make("out", SIDES)

    class Killed(BaseException):
        pass

    def killing(wrapped, matters=lambda *_: True):
        seen = []

        def call(*args, **kwargs):
            seen.extend([1] if matters(*args) else [])
            if len(seen) > after:
                raise Killed
            return wrapped(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        if stage == "place":
            patched.setattr(LocalWorkspace, stage, killing(LocalWorkspace.place))
        elif hasattr(module, stage):
            patched.setattr(module, stage, killing(getattr(module, stage)))
        else:
            wrapped = killing(Storage.write, lambda _, name, data: name == stage)
            patched.setattr(Storage, "write", wrapped)
        with pytest.raises(Killed):
            run(plan, space)
    assert not (tmp_path / "out" / "train" / manifest.NAME).exists()
    run(plan, space)
    space.close()
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_too_many_rejects_keep_everything_and_name_the_limit(make, tmp_path):
    plan, space = make("out", SIDES, rejects=[5, 6])
    with pytest.raises(UserError, match=r"8 of 27 documents.*not JSON: 8; first in 0.jsonl") as e:
        run(plan, space, 0.1)
    limit = e.value.fix["--max_reject_fraction"]
    assert 8 / 27 <= limit < 0.3
    assert f"{tmp_path / 'out' / '.prepare' / REJECTS}" in str(e.value)
    listed = (tmp_path / "out" / ".prepare" / REJECTS).read_text()
    run(plan, space, limit)
    assert (tmp_path / "out" / "train" / REJECTS).read_text() == listed


def test_the_budget_of_quarantined_inputs_is_counted_in_bytes(make, tmp_path):
    plan, space = make("out", [([BIG], [50]), ([BIG], [50])], quarantined=[650])
    with pytest.raises(
        UserError, match=r"2 damaged inputs with 1,300 of 7,800 bytes.*0.jsonl"
    ) as e:
        run(plan, space, 0.1)
    limit = e.value.fix["--max_reject_fraction"]
    assert limit == 0.167
    # They may be mended by now: their units are to be done again.
    assert space.committed() == set()
    plan, space = make("again", [([BIG], [50]), ([BIG], [50])], quarantined=[650])
    made = run(plan, space, limit)
    assert made["train"].source.quarantined == (("0.jsonl", "damaged"), ("1.jsonl", "damaged"))
    assert "`1.jsonl`: damaged" in (tmp_path / "again" / "train" / "README.md").read_text()


def test_an_empty_split_is_refused(make):
    plan, space = make("no-val", [([BIG], []), ([BIG], [])])
    with pytest.raises(UserError, match="the val share is empty: --val_fraction 0.5 of 2"):
        run(plan, space)
    plan, space = make("nothing", [([],)], val=False)
    with pytest.raises(RunError, match="no document gave any token"):
        run(plan, space)


def test_no_dataset_depends_on_its_place(make, tmp_path):
    for name in ("one", "two"):
        plan, space = make(name, [([BIG, SMALL],), ([SMALL],)], val=False)
        run(plan, space)
        space.close()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "manifest.json").read_text()


def test_the_card_says_what_the_manifest_says(make, tmp_path):
    plan, space = make("out", SIDES, rejects=[5], filtered=3)
    run(plan, space, 1.0)
    card = (tmp_path / "out" / "train" / "README.md").read_text()
    for words in (
        "license: unknown",
        "2,670",  # tokens
        "id 0 before each document",
        plan.recipe.tokenizer,
        '{"meta.set": {"not_in": ["a"]}}',
        "4 files, 4,000 bytes",
        "- 4 documents: not JSON",
        "- 12 documents by filters",
        "TokensLoader(block_size=2049)",
    ):
        assert words in card, words


def test_records_are_not_kept(make, monkeypatch):
    """Memory must not grow with the number of units."""
    plan, space = make("out", [([BIG, SMALL], [50])] * 8)
    alive: weakref.WeakSet[UnitRecord] = weakref.WeakSet()

    class Seen(UnitRecord):
        __hash__ = object.__hash__

    def records(self, num_units):
        for record in original(self, num_units):
            seen = Seen(**vars(record))
            alive.add(seen)
            yield seen
            del seen, record
            # The one that was given last may still be held by the loop.
            assert len(alive) <= 1

    original = LocalWorkspace.records
    monkeypatch.setattr(LocalWorkspace, "records", records)
    run(plan, space)
    assert len(alive) <= 1

"""Packed rows hold every target once, are nearly full, and come from a plan that outlives kills."""

from __future__ import annotations

import bisect
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.reading import pack
from gristmill.data.reading.mixture import Mixture, Stage
from gristmill.data.reading.pack import find_plan, pack_chunk, pack_lengths
from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import RunError, UserError

from .made_datasets import documents_of, make_dataset, write_litdata

SEQ_LEN = 16
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A user's cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "gristmill" / "packing"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """70 chunks, most documents shorter than a row; one document goes on in the next chunk."""
    chosen = np.random.default_rng(1)
    lengths = [chosen.integers(1, 30, size=chosen.integers(1, 25)).tolist() for _ in range(70)]
    return make_dataset(tmp_path_factory.mktemp("pack") / "data", lengths, cut=4)


@pytest.fixture
def fresh(dataset, cache):
    """The dataset, and where its plan comes to lie; none is there yet."""
    place = cache / f"{dataset.dataset_id[:32]}-{SEQ_LEN}-v{pack.VERSION}"
    for path in (place, place.with_name(f"{place.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)
    return place


def targets(batch):
    """Each (token, next token) that a batch trains on."""
    for tokens, length, ends in zip(batch.tokens, batch.lengths, batch.doc_ends, strict=True):
        first = {0, *ends.tolist()}
        yield from ((tokens[i - 1], tokens[i]) for i in range(1, length) if i not in first)


def wanted_targets(dataset):
    for document in documents_of(dataset):
        yield from zip(document, document[1:], strict=False)


@settings(deadline=None, max_examples=80)
@given(
    chunks=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=4),
    seq_len=st.integers(1, 45),
    shuffle=st.booleans(),
    cut=st.integers(-1, 2),
)
def test_an_epoch_has_every_target_once(chunks, seq_len, shuffle, cut):
    chunks[0].append(2)  # one target at least
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder) / "data", chunks, cut=cut)
        options = {"seed": 3, "shuffle": shuffle, "endless": False, "packing": True}
        stream = TokenStream(data, seq_len, **options)
        batch = stream.batch(0, stream.num_samples + 2)
        found = Counter(targets(batch))
        assert found == Counter(wanted_targets(data))
        assert set(found.values()) == {1}
        assert int(batch.valid.sum()) == stream.num_samples
        assert stream.packing[0].tokens == int(batch.lengths.sum())
        assert (batch.lengths[batch.valid] >= 2).all()
        assert (batch.lengths[~batch.valid] == 0).all()


def test_documents_that_fit_are_whole_and_rows_begin_and_end_with_pieces(dataset):
    stream = TokenStream(dataset, SEQ_LEN, seed=0, shuffle=False, endless=False, packing=True)
    batch = stream.batch(0, stream.num_samples)
    pieces = []
    for tokens, length, ends in zip(batch.tokens, batch.lengths, batch.doc_ends, strict=True):
        assert ends.dtype == np.int32
        assert int(ends[-1]) == length <= SEQ_LEN + 1
        assert (tokens[length:] == 0).all()
        pieces += [piece.tolist() for piece in np.split(tokens[:length], ends[:-1])]
    firsts = batch.tokens[:, 0]  # tokens of the dataset count up
    assert (firsts[1:] > firsts[:-1]).all()
    assert all((np.diff(row[:n]) > 0).all() for row, n in zip(batch.tokens, batch.lengths))
    whole = [d for d in documents_of(dataset) if 2 <= len(d) <= SEQ_LEN + 1]
    assert len(whole) > 300
    assert all(document in pieces for document in whole)


def test_a_long_document_is_cut_with_one_token_of_overlap(tmp_path):
    data = make_dataset(tmp_path / "long", [[1, 10, 1, 3]])
    stream = TokenStream(data, 4, seed=0, shuffle=False, endless=False, packing=True)
    batch = stream.batch(0, stream.num_samples)
    # Token 1 to 10 in pieces 1-5, 5-9, 9-10; the document of three joins the last of them.
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 12, 13, 14]]
    assert [e.tolist() for e in batch.doc_ends] == [[5], [5], [2, 5]]
    summary = stream.packing[0]
    assert (summary.documents, summary.cut, summary.padding) == (4, 1, 0.0)
    assert summary.cut_share == 0.25


def rooms_of_plain_best_fit(lengths, width):
    """What best-fit decreasing leaves in each row, one piece after another."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else width
        bisect.insort(rooms, room - length)
    return rooms


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(2, 60))
def test_rows_are_those_of_best_fit_decreasing(data, width):
    lengths = data.draw(st.lists(st.integers(2, width), max_size=80))
    row, rows = pack_lengths(np.array(lengths, dtype=np.int64), width)
    used = np.bincount(row, weights=lengths, minlength=rows).astype(int)
    assert len(used) == rows
    assert sorted((width - used).tolist()) == rooms_of_plain_best_fit(lengths, width)


@pytest.mark.parametrize("seq_len", [512, 2048, 8192, 32768])
def test_rows_of_a_large_chunk_are_nearly_full(seq_len):
    """26,000 documents as web pages are long: half below 400 tokens, some of tens of thousands."""
    lengths = np.random.default_rng(2).lognormal(5.9, 1.1, 26_000).astype(np.int64) + 1
    rows = pack_chunk(np.cumsum(lengths), seq_len)
    assert rows.tokens / (len(rows.row_ends) * (seq_len + 1)) > 0.97
    assert int((lengths - 1).sum()) == rows.tokens - len(rows.starts)  # a target less than tokens
    assert rows.cut == int((lengths > seq_len + 1).sum())


def test_documents_without_tokens_of_adopted_datasets(tmp_path):
    documents = [[1, 2, 3], [], [4], [], [5, 6], []]
    data = Dataset.open(write_litdata(tmp_path / "theirs", [documents, [[], [7]]]))
    stream = TokenStream(data, 4, seed=0, shuffle=False, endless=False, packing=True)
    assert stream.batch(0, 9).tokens[0].tolist() == [1, 2, 3, 5, 6]
    assert (stream.num_samples, stream.packing[0].documents) == (1, 4)


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(0, 3000), size=st.integers(1, 40), world=st.sampled_from([1, 2, 3, 4, 8])
)
def test_ranks_together_read_the_batch_also_after_a_restart(dataset, samples, size, world):
    whole = TokenStream(dataset, SEQ_LEN, seed=9, packing=True).batch(samples, size)
    stream = TokenStream(dataset, SEQ_LEN, seed=9, packing=True)
    parts = [stream.batch(samples, size, rank, world) for rank in range(world)]
    for name in ("tokens", "lengths", "sample_ids"):
        together = np.concatenate([getattr(part, name)[part.valid] for part in parts])
        assert np.array_equal(together, getattr(whole, name))
    ends = [e.tolist() for p in parts for e, ok in zip(p.doc_ends, p.valid, strict=True) if ok]
    assert ends == [e.tolist() for e in whole.doc_ends]


def test_shuffled_rows_are_the_rows_of_their_ids_each_once_an_epoch(dataset):
    plain = TokenStream(dataset, SEQ_LEN, seed=3, shuffle=False, packing=True)
    rows = plain.batch(0, plain.num_samples)
    assert rows.sample_ids.tolist() == list(range(plain.num_samples))
    stream = TokenStream(dataset, SEQ_LEN, seed=3, packing=True)
    for epoch in range(2):
        batch = stream.batch(epoch * stream.num_samples, stream.num_samples)
        assert sorted(batch.sample_ids.tolist()) == list(range(stream.num_samples))
        assert np.array_equal(batch.tokens, rows.tokens[batch.sample_ids])


def test_mixed_sources_are_packed_each_by_its_plan(dataset, tmp_path):
    other = make_dataset(tmp_path / "other", [[5, 12, 40, 3], [7] * 9])
    mixture = Mixture([Stage(0, (1, 1))])
    stream = TokenStream([dataset, other], SEQ_LEN, seed=3, mixture=mixture, packing=True)
    alone = TokenStream(other, SEQ_LEN, seed=0, shuffle=False, packing=True)
    assert stream.source_samples()[1] == alone.num_samples
    batch = stream.batch(0, 40)
    theirs = batch.sources == 1
    assert int(theirs.sum()) == 20
    rows = alone.batch(0, alone.num_samples).tokens
    first = int(stream.source_samples()[0])
    assert np.array_equal(batch.tokens[theirs], rows[batch.sample_ids[theirs] - first])


def test_the_fingerprint_names_the_packing_and_that_of_others_stays(dataset):
    packed = TokenStream(dataset, SEQ_LEN, seed=1, packing=True).fingerprint()
    plain = TokenStream(dataset, SEQ_LEN, seed=1)
    assert packed == plain.fingerprint() | {"packing": pack.VERSION}
    assert "packing" not in plain.fingerprint()
    assert plain.packing == []
    assert plain.batch(0, 3).lengths.tolist() == [SEQ_LEN + 1] * 3


def test_the_plan_is_found_again(dataset, fresh, monkeypatch):
    before = TokenStream(dataset, SEQ_LEN, seed=1, packing=True).batch(7, 30)
    monkeypatch.setattr(pack, "pack_chunk", lambda *_: pytest.fail("made again"))
    again = TokenStream(Dataset.open(dataset.path), SEQ_LEN, seed=1, packing=True).batch(7, 30)
    assert np.array_equal(again.tokens, before.tokens)
    with pytest.raises(pytest.fail.Exception):
        find_plan(dataset, SEQ_LEN + 1)


def files_of(place):
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def make_and_die(dataset, at):
    """Make the plan in a process that is killed at this chunk."""
    real, made = pack.pack_chunk, []

    def packs(*arguments):
        if len(made) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(1)
        return real(*arguments)

    pack.pack_chunk = packs
    find_plan(dataset, SEQ_LEN)


@pytest.mark.parametrize("at", [0, 40])
def test_a_kill_while_it_is_written_leaves_no_plan_and_no_lock(dataset, fresh, at):
    find_plan(dataset, SEQ_LEN)
    expected = files_of(fresh)
    shutil.rmtree(fresh)
    process = FORK.Process(target=make_and_die, args=(dataset, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    partial = fresh.with_name(f"{fresh.name}.partial")
    assert partial.is_dir()
    assert not fresh.exists()
    find_plan(dataset, SEQ_LEN)
    assert files_of(fresh) == expected
    assert not partial.exists()


@pytest.mark.parametrize("name", ["plan.json", "chunks.npy", "starts.u32", "row_ends.u32"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_plan_that_is_not_whole_is_made_again(dataset, fresh, name, how):
    find_plan(dataset, SEQ_LEN)
    expected = files_of(fresh)
    if how == "gone":
        (fresh / name).unlink()
    else:
        os.truncate(fresh / name, (fresh / name).stat().st_size // 2)
    find_plan(dataset, SEQ_LEN)
    assert files_of(fresh) == expected


def make_and_count(dataset, log):
    real = pack.pack_chunk

    def packs(*arguments):
        with log.open("ab") as file:
            file.write(b".")
        return real(*arguments)

    pack.pack_chunk = packs
    find_plan(dataset, SEQ_LEN)


def test_of_several_processes_one_makes_the_plan(dataset, fresh, tmp_path):
    log = tmp_path / "log"
    processes = [FORK.Process(target=make_and_count, args=(dataset, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.stat().st_size == len(dataset.chunks)


def test_the_summary_is_that_of_the_rows(dataset, fresh):
    summary = find_plan(dataset, SEQ_LEN).summary
    assert json.loads((fresh / "plan.json").read_bytes())["rows"] == summary.rows
    lengths = [len(document) for document in documents_of(dataset)]
    assert summary.cut == sum(length > SEQ_LEN + 1 for length in lengths)
    assert summary.padding == 1 - summary.tokens / (summary.rows * (SEQ_LEN + 1))


def test_what_cannot_be_packed_is_refused(dataset, tmp_path, monkeypatch):
    single = make_dataset(tmp_path / "single", [[1, 1, 1]])
    with pytest.raises(UserError, match="single token") as refused:
        TokenStream(single, 4, seed=0, packing=True)
    assert refused.value.fix == {"--train.packing": "concat"}
    assert TokenStream(single, 4, seed=0, endless=False, packing=True).num_samples == 0
    remote = Dataset.open(dataset.path)
    monkeypatch.setattr(remote, "cache", object())
    with pytest.raises(UserError, match="object store"):
        find_plan(remote, SEQ_LEN)


def test_a_cache_that_cannot_be_written_is_named(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match="XDG_CACHE_HOME"):
        find_plan(dataset, SEQ_LEN)

"""The stream of a mixture: one order for any ranks, restarts and batches; object stores too."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.reading.chunk_cache import ChunkCache
from gristmill.data.reading.mixture import Mixture, Stage
from gristmill.data.reading.stream import TokenStream
from gristmill.data.storage import Storage
from gristmill.data.store.dataset import Dataset

from .made_datasets import make_dataset
from .test_chunk_cache import Faulty, settle

SEQ_LEN, BATCH = 7, 250
WEIGHTS = (5, 3, 1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Three datasets of 70, 9 and 1 chunks."""
    chosen = np.random.default_rng(1)
    made = []
    for number, chunks in enumerate((70, 9, 1)):
        lengths = [
            chosen.integers(1, 60, size=chosen.integers(3, 9)).tolist() for _ in range(chunks)
        ]
        made.append(make_dataset(tmp_path_factory.mktemp(f"source{number}") / "data", lengths))
    return made


def mixed(sources: list[Dataset], **options) -> TokenStream:
    stages = [Stage(0, WEIGHTS), Stage(700, (1, 1, 0)), Stage(900, (0, 2, 7))]
    return TokenStream(sources, SEQ_LEN, seed=3, mixture=Mixture(stages), **options)


def ids_of(stream: TokenStream, samples: int, size: int, world: int) -> list[int]:
    """A global batch, read by its ranks."""
    parts = [stream.batch(samples, size, rank, world) for rank in range(world)]
    assert len({len(part.valid) for part in parts}) == 1
    found = [part.sample_ids[part.valid].tolist() for part in parts]
    return [number for part in found for number in part]


def two_epochs(stream: TokenStream) -> int:
    """Samples until the largest source of the first stage has been read twice."""
    return 2 * int(stream.source_samples()[0]) * sum(WEIGHTS) // WEIGHTS[0]


@pytest.fixture(scope="module")
def orders(sources) -> list[list[list[int]]]:
    """Batches into the second epoch, as one rank reads them: spread or not."""
    streams = [mixed(sources, spread=spread) for spread in (False, True)]
    starts = range(0, two_epochs(streams[0]) // 2 + 2 * BATCH, BATCH)
    return [[ids_of(stream, start, BATCH, 1) for start in starts] for stream in streams]


@settings(deadline=None, max_examples=6)
@given(data=st.data(), spread=st.booleans())
def test_the_stream_is_the_same_for_any_ranks_and_restarts(sources, orders, data, spread):
    expected = orders[spread]
    number = 0
    while number < len(expected):
        # A restart: another process, another number of ranks, from the count of samples alone.
        stream = mixed(sources, spread=spread)
        world = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        for _ in range(data.draw(st.integers(1, len(expected)))):
            if number < len(expected):
                assert ids_of(stream, number * BATCH, BATCH, world) == expected[number]
                number += 1


@pytest.mark.parametrize("size", [1, 5, 64, 999])
def test_batch_size_only_regroups_the_samples(sources, size):
    stream = mixed(sources)
    whole = sorted(ids_of(stream, 0, 990, 1))
    parts = [ids_of(stream, s, min(size, 990 - s), 2) for s in range(0, 990, size)]
    assert sorted(number for part in parts for number in part) == whole


def test_every_sample_of_an_epoch_comes_once_from_each_source(sources):
    stream = TokenStream(sources, SEQ_LEN, seed=3, mixture=Mixture([Stage(0, WEIGHTS)]))
    total = two_epochs(stream)
    batch = stream.batch(0, total)
    # Rows of a batch are sorted for reading; the epochs are those of the numbers in each source.
    starts = np.concatenate([[0], np.cumsum(stream.source_samples())])
    for source in range(3):
        ids = batch.sample_ids[batch.sources == source]
        assert ids.min() >= starts[source]
        assert ids.max() < starts[source + 1]
        times = np.bincount(ids - starts[source], minlength=starts[source + 1] - starts[source])
        full, rest = divmod(len(ids), int(stream.source_samples()[source]))
        assert set(times.tolist()) <= ({full, full + 1} if rest else {full})
    assert stream.epochs(total)[0] == pytest.approx(2, rel=0.01)


def test_one_source_is_read_in_the_order_it_has_alone(sources):
    alone = TokenStream(sources[0], SEQ_LEN, seed=3)
    mixture = Mixture([Stage(0, (1, 0, 0))])
    together = TokenStream(sources, SEQ_LEN, seed=3, mixture=mixture)
    assert ids_of(alone, 40, 100, 1) == ids_of(together, 40, 100, 1)


def test_validation_goes_through_all_sources_once(sources):
    stream = TokenStream(sources, SEQ_LEN, seed=0, shuffle=False, endless=False)
    for world in (1, 3):
        ids = []
        for start in range(0, stream.num_samples, 10):
            ids += ids_of(stream, start, 10, world)
        assert ids == list(range(stream.num_samples))
    assert not stream.batch(stream.num_samples, 10).valid.any()


def test_the_fingerprint_names_mixture_and_sources(sources):
    one = mixed(sources).fingerprint()
    other = TokenStream(sources, SEQ_LEN, seed=3, mixture=Mixture([Stage(0, WEIGHTS)]))
    assert one != other.fingerprint()
    assert {k for k, v in one.items() if other.fingerprint()[k] != v} == {"mixture"}


def remote(sources, cache, **faults) -> list[Dataset]:
    """The datasets as if on an object store with faults, read through a cache."""
    opened = []
    for dataset in sources:
        copy = Dataset(dataset.path, dataset.manifest, dataset.chunks, cache)
        copy.storage = Faulty(dataset.path, **faults)
        opened.append(copy)
    return opened


def test_from_an_object_store_the_stream_is_the_same(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("gristmill.data.reading.chunk_cache._FIRST_DELAY_S", 0.001)
    largest = max(int(d.chunks.sizes.max()) for d in sources)
    cache = ChunkCache(tmp_path, 74 * largest)
    faults = {c.name: ["503", "truncated", "corrupt"] for c in list(sources[0].chunks)[::5]}
    stores = remote(sources, cache, faults=faults)
    local, stream = mixed(sources), mixed(stores)
    bound = []
    for start in range(0, 1200, 16):
        mine, theirs = stream.batch(start, 16, 1, 2), local.batch(start, 16, 1, 2)
        assert np.array_equal(mine.tokens, theirs.tokens)
        assert np.array_equal(mine.sample_ids, theirs.sample_ids)
        assert all(map(np.array_equal, mine.doc_ends, theirs.doc_ends))
        with cache._locked():
            bound.append(sum(p.stat().st_size for p in (tmp_path / "chunks").iterdir()))
    assert 0 < max(bound) <= cache.max_bytes
    cache.close()


def test_chunks_are_fetched_before_they_are_needed(sources, tmp_path):
    size = int(sources[0].chunks.sizes.sum())
    cache = ChunkCache(tmp_path, size)
    (store,) = remote(sources[:1], cache)
    stream = TokenStream(store, SEQ_LEN, seed=3)
    waited = []
    fetch = cache._fetch

    def watched(wanted, *, urgent):
        if urgent and threading.current_thread() is threading.main_thread():
            waited.append(wanted)
        return fetch(wanted, urgent=urgent)

    stream.batch(0, 8)
    settle(cache)
    cache._fetch = watched
    for start in range(8, 800, 8):
        stream.batch(start, 8)
        settle(cache)
    assert not waited
    # Every chunk was fetched once: the cache holds them all.
    assert cache.downloads == sum(1 for c in store.chunks if c.tokens > SEQ_LEN)
    cache.close()


def test_the_next_window_is_in_view_from_afar(tmp_path, monkeypatch):
    monkeypatch.setattr("gristmill.data.reading.look_ahead._MAX_BATCHES", 4)
    monkeypatch.setattr("gristmill.data.reading.look_ahead._BLOCK_SAMPLES", 100)
    made = make_dataset(tmp_path / "data", [[10 * SEQ_LEN + 1]] * 150)
    cache = ChunkCache(tmp_path / "cache", 100 * int(made.chunks.sizes[0]))
    (store,) = remote([made], cache)
    stream = TokenStream(store, SEQ_LEN, seed=3)
    for start in range(0, 40, 2):
        stream.batch(start, 2)
        settle(cache)
    order = stream._orders[0].epoch(0).chunks
    here = {path.name for path in (tmp_path / "cache" / "chunks").iterdir()}
    # The window of 640 samples that is read, and as much of the next one as there is room for.
    assert {store.chunks[int(chunk)].xxh3 for chunk in order[:64]} <= here
    assert len(here) == 100
    for start in range(40, 1500, 2):
        stream.batch(start, 2)
        settle(cache)
    # Whatever was fetched in advance was used before it went; of the last, some is yet to come.
    assert cache.downloads <= 150 + 100
    cache.close()


def test_a_chunk_damaged_on_this_disk_is_fetched_again(sources, tmp_path):
    cache = ChunkCache(tmp_path, 10**6)
    (store,) = remote(sources[1:2], cache)
    whole = store.map(2).tokens.tolist()
    store._mapped.clear()
    path = tmp_path / "chunks" / store.chunks[2].xxh3
    path.write_bytes(path.read_bytes()[:-2])
    assert store.map(2).tokens.tolist() == whole
    assert cache.downloads == 2
    cache.close()


def test_a_dataset_at_a_url_opens_like_a_folder(sources, tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe({f"/bucket/{p.name}": p.read_bytes() for p in sources[1].path.iterdir()})
    cache = ChunkCache(tmp_path, 10**6)
    opened = Dataset.open("memory://bucket", cache=cache)
    assert opened.dataset_id == sources[1].dataset_id
    assert isinstance(opened.storage, Storage)
    assert opened.tokenizer_dir is None
    mine = TokenStream(opened, SEQ_LEN, seed=1).batch(0, 50)
    theirs = TokenStream(sources[1], SEQ_LEN, seed=1).batch(0, 50)
    assert np.array_equal(mine.tokens, theirs.tokens)
    cache.close()

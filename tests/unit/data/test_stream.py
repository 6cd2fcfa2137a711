from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

from .made_datasets import make_dataset

SEQ_LEN = 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """70 chunks of ragged lengths, some too short for a sample."""
    chosen = np.random.default_rng(1)
    lengths = [chosen.integers(1, 30, size=chosen.integers(1, 9)).tolist() for _ in range(70)]
    return make_dataset(tmp_path_factory.mktemp("stream") / "data", lengths)


def test_a_row_is_the_tokens_of_its_sample(dataset):
    stream = TokenStream(dataset, SEQ_LEN, seed=3, shuffle=False)
    batch = stream.batch(0, stream.num_samples)
    assert batch.valid.all()
    expected = [
        dataset.map(c).tokens[r * SEQ_LEN : r * SEQ_LEN + SEQ_LEN + 1]
        for c, chunk in enumerate(dataset.chunks)
        for r in range((chunk.tokens - 1) // SEQ_LEN)
    ]
    assert np.array_equal(batch.tokens, np.array(expected))
    assert batch.tokens.dtype == np.int64
    assert batch.tokens.flags["C_CONTIGUOUS"]
    assert batch.tokens.flags["WRITEABLE"]
    assert batch.sample_ids.tolist() == list(range(stream.num_samples))


def test_shuffled_rows_are_the_samples_of_their_ids(dataset):
    plain = TokenStream(dataset, SEQ_LEN, seed=3, shuffle=False)
    all_rows = plain.batch(0, plain.num_samples).tokens
    stream = TokenStream(dataset, SEQ_LEN, seed=3)
    batch = stream.batch(5, 64)
    assert np.array_equal(batch.tokens, all_rows[batch.sample_ids])


def test_an_epoch_has_every_sample_once(dataset):
    stream = TokenStream(dataset, SEQ_LEN, seed=3)
    for epoch in range(3):
        ids = stream.batch(epoch * stream.num_samples, stream.num_samples).sample_ids
        assert sorted(ids.tolist()) == list(range(stream.num_samples))


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(0, 2000), size=st.integers(1, 40), world=st.sampled_from([1, 2, 3, 4, 8])
)
def test_ranks_together_read_the_batch(dataset, samples, size, world):
    stream = TokenStream(dataset, SEQ_LEN, seed=9)
    whole = stream.batch(samples, size)
    parts = [stream.batch(samples, size, rank, world) for rank in range(world)]
    assert {len(part.tokens) for part in parts} == {-(-size // world)}
    together = np.concatenate([part.tokens[part.valid] for part in parts])
    assert np.array_equal(together, whole.tokens)
    ends = [e.tolist() for p in parts for e, ok in zip(p.doc_ends, p.valid, strict=True) if ok]
    assert ends == [e.tolist() for e in whole.doc_ends]
    assert all((part.tokens[~part.valid] == 0).all() for part in parts)
    assert all((part.sample_ids[~part.valid] == -1).all() for part in parts)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 50))
def test_the_stream_does_not_depend_on_batches_or_restarts(dataset, sizes, other):
    """Any batch sizes give the same samples, and another process gives the same batch."""
    consumed, ids = 0, []
    stream = TokenStream(dataset, SEQ_LEN, seed=9)
    for size in sizes:
        ids.append(stream.batch(consumed, size).sample_ids)
        consumed += size
    whole = TokenStream(dataset, SEQ_LEN, seed=9).batch(0, consumed).sample_ids
    assert sorted(np.concatenate(ids).tolist()) == sorted(whole.tolist())
    resumed = TokenStream(dataset, SEQ_LEN, seed=9).batch(consumed, other)
    assert np.array_equal(resumed.tokens, stream.batch(consumed, other).tokens)


def test_document_ends(tmp_path):
    dataset = make_dataset(tmp_path / "ends", [[3, 4, 1, 9, 2], [20]], cut=0)
    stream = TokenStream(dataset, SEQ_LEN, seed=0, shuffle=False)
    batch = stream.batch(0, stream.num_samples)
    # Ends 3, 7, 8, 17, and 19 which is a cut; samples begin at 0 and 7, and 0 and 7 of chunk 1.
    assert [e.tolist() for e in batch.doc_ends] == [[3, 7, 8], [1], [], []]
    assert batch.doc_ends[0].dtype == np.int32
    long = TokenStream(dataset, 18, seed=0, shuffle=False).batch(0, 1)
    assert long.doc_ends[0].tolist() == [3, 7, 8, 17]
    # The last token of chunk 1 ends its document.
    assert TokenStream(dataset, 19, seed=0, shuffle=False).batch(0, 1).doc_ends[0].tolist() == [20]


def test_one_pass_ends_with_rows_that_are_not_valid(dataset):
    stream = TokenStream(dataset, SEQ_LEN, seed=0, shuffle=False, endless=False)
    last = stream.batch(stream.num_samples - 3, 8)
    assert last.valid.tolist() == [True] * 3 + [False] * 5
    assert last.sample_ids[:3].tolist() == list(range(stream.num_samples - 3, stream.num_samples))
    assert (last.tokens[3:] == 0).all()
    assert len(last.doc_ends) == 8
    assert not stream.batch(stream.num_samples + 10, 4).valid.any()
    for world in (1, 2, 3):
        parts = [stream.batch(stream.num_samples - 3, 8, r, world) for r in range(world)]
        assert sum(int(p.valid.sum()) for p in parts) == 3


def test_a_batch_larger_than_the_dataset_goes_on(tmp_path):
    dataset = make_dataset(tmp_path / "tiny", [[16]])
    stream = TokenStream(dataset, SEQ_LEN, seed=0)
    assert stream.num_samples == 2
    ids = stream.batch(1, 7).sample_ids.tolist()
    assert sorted(ids) in ([0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])


def test_fingerprint_names_what_matters(dataset):
    one = TokenStream(dataset, SEQ_LEN, seed=1).fingerprint()
    assert one == TokenStream(dataset, SEQ_LEN, seed=1).fingerprint()
    assert one["dataset_id"] == dataset.dataset_id
    for other in (
        TokenStream(dataset, SEQ_LEN + 1, seed=1),
        TokenStream(dataset, SEQ_LEN, seed=2),
        TokenStream(dataset, SEQ_LEN, seed=1, shuffle=False),
    ):
        assert other.fingerprint() != one


def test_no_sample_is_refused_with_the_numbers(tmp_path):
    dataset = make_dataset(tmp_path / "short", [[5], [3, 3]])
    with pytest.raises(
        UserError, match=r"11 tokens in 2 chunks, the longest of 6.*takes 9"
    ) as error:
        TokenStream(dataset, 8, seed=0)
    assert error.value.fix == {"--train.max_seq_length": 5}
    assert TokenStream(dataset, 8, seed=0, endless=False).num_samples == 0
    TokenStream(dataset, 5, seed=0)

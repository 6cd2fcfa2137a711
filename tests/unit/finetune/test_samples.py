"""The order of records, and that packing, ranks and micro-batches change nothing of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from gristmill.config.model import ModelConfig
from gristmill.finetune.examples import Examples
from gristmill.finetune.samples import HeldOutRows, RecordSamples, pack
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.models.loss import IGNORE
from gristmill.train.batch import TokenBatch

CPU = torch.device("cpu")
TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    intermediate_size=48,
    vocab_size=64,
    max_seq_length=40,
)


def examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    learned = np.zeros(starts[-1], dtype=np.bool_)
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        learned[start + (stop - start) // 2 : stop] = True
    tokens = rng.integers(1, 64, starts[-1]).astype(np.int32)
    return Examples(tokens, learned, starts.astype(np.int64), "digest")


MIXED = examples([3, 9, 25, 4, 4, 12, 31, 7, 2, 18, 6])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_takes_every_record_once_and_overfills_no_row(lengths):
    rows = pack(lengths, 20)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 20 for row in rows)
    # Best-fit decreasing is within 11/9 of the best, and that is at least the sum.
    assert len(rows) <= 11 / 9 * max(-(-sum(lengths) // 20), len(lengths) and 1) + 6 / 9 + len(
        [length for length in lengths if length > 10]
    )


def records_of(batch):
    """The records in a batch, as tuples of their tokens."""
    found = []
    for row, ends, valid in zip(batch.tokens, batch.doc_ends, batch.valid, strict=True):
        starts = [0, *ends[:-1].tolist()] if len(ends) else []
        assert valid == bool(len(ends))
        found += [tuple(row[a:b]) for a, b in zip(starts, ends.tolist(), strict=True)]
    return sorted(found)


def test_every_record_once_an_epoch_in_another_order():
    samples = RecordSamples(MIXED, 31, seed=1, packing=True)
    first, second = (records_of(samples.batch(11 * e, 11)) for e in (0, 1))
    assert first == second
    assert len(set(first)) == 11
    one_by_one = [[records_of(samples.batch(11 * e + n, 1))[0] for n in range(11)] for e in (0, 1)]
    assert sorted(one_by_one[0]) == first
    assert one_by_one[0] != one_by_one[1]
    other = RecordSamples(MIXED, 31, seed=2, packing=True)
    assert other.fingerprint() != samples.fingerprint()
    assert records_of(other.batch(0, 4)) != records_of(samples.batch(0, 4))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_a_batch_in_as_many_rows_each(packing, world):
    samples = RecordSamples(MIXED, 31, seed=1, packing=packing)
    whole = records_of(samples.batch(3, 9))
    parts = [samples.batch(3, 9, rank, world) for rank in range(world)]
    assert sorted(r for part in parts for r in records_of(part)) == whole
    assert len({len(part.tokens) for part in parts}) == 1


def test_tokens_are_counted_as_they_are():
    samples = RecordSamples(MIXED, 31, seed=1, packing=True)
    total = int(MIXED.lengths.sum())
    assert samples.num_tokens(0, 11) == total == samples.num_tokens(22, 11)
    assert samples.num_tokens(0, 25) == 2 * total + samples.num_tokens(22, 3)
    for start, count in ((5, 4), (9, 6), (8, 30)):
        assert samples.num_tokens(start, count) == sum(
            map(len, records_of(samples.batch(start, count)))
        )
    assert samples.usual_rows(11) == len(samples.batch(0, 11).tokens)
    assert RecordSamples(MIXED, 31, seed=1, packing=False).usual_rows(11) == 11


def loss_and_gradients(batch, size):
    model = Decoder(TINY)
    init_weights(model, 0)
    batch = TokenBatch.of(batch, CPU, document_mask=True)
    total = torch.zeros(())
    for inputs, targets, documents in batch.micro_batches(size):
        loss = model(inputs, targets, documents=documents) / batch.num_targets
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters()}


def test_packed_or_padded_all_at_once_or_in_parts_a_step_is_the_same():
    padded = RecordSamples(MIXED, 31, seed=1, packing=False).batch(0, 9)
    wanted, gradients = loss_and_gradients(padded, 9)
    packed = RecordSamples(MIXED, 31, seed=1, packing=True).batch(0, 9)
    assert len(packed.tokens) < len(padded.tokens)
    for size in (1, 2, 8):
        loss, got = loss_and_gradients(packed, size)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        for name, gradient in got.items():
            assert (gradient - gradients[name]).abs().max() < 1e-6, name


def test_the_loss_is_that_of_the_learned_tokens_and_of_nothing_else():
    batch = RecordSamples(MIXED, 31, seed=1, packing=True).batch(0, 11)
    model = Decoder(TINY)
    init_weights(model, 0)
    total, count = 0.0, 0
    for start, stop in zip(MIXED.starts[:-1].tolist(), MIXED.starts[1:].tolist(), strict=True):
        ids = torch.from_numpy(MIXED.tokens[start:stop]).long()
        learned = torch.from_numpy(MIXED.learned[start:stop])[1:]
        logits = model(ids[None, :-1])[0]
        losses = functional.cross_entropy(logits, ids[1:], reduction="none")
        total += losses[learned].sum().item()
        count += int(learned.sum())
    on_device = TokenBatch.of(batch, CPU, document_mask=True)
    assert on_device.num_targets == count
    got = sum(model(i, t, documents=d).item() for i, t, d in on_device.micro_batches(4))
    assert got == pytest.approx(total, rel=1e-6)
    for inputs, targets, _ in on_device.micro_batches(4):
        assert (targets != IGNORE).sum(dim=1).max() < inputs.shape[1]


def test_held_out_rows_are_all_records_once():
    rows = HeldOutRows(MIXED, 31)
    whole = rows.batch(0, rows.num_samples)
    assert len(records_of(whole)) == 11
    assert sorted(map(len, records_of(whole))) == sorted(MIXED.lengths.tolist())
    parts = [rows.batch(0, 3, rank, 2) for rank in (0, 1)]
    assert sorted(r for p in parts for r in records_of(p)) == records_of(rows.batch(0, 3))
    assert {len(p.tokens) for p in parts} == {2}
    last = rows.batch(rows.num_samples - 1, 4)
    assert last.valid.tolist() == [True, False, False, False]
    assert rows.num_tokens(0, rows.num_samples) == int(MIXED.lengths.sum())

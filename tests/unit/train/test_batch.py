"""What of a batch is a target: none across documents, none in padding of rows or of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.config.model import ModelConfig
from gristmill.data.reading.stream import Batch
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.models.loss import IGNORE
from gristmill.train.batch import TokenBatch

CPU = torch.device("cpu")
SEQ_LEN = 24
VOCABULARY = 64
# Documents of each row; a row holds SEQ_LEN + 1 tokens, and what is missing is padding.
ROWS = [[12, 8, 5], [13, 7], [2], [25], [3, 2, 2, 2, 2], []]


def packed(rows=ROWS, width=SEQ_LEN + 1):
    """A batch of rows of documents, padded with a token that also occurs in them."""
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    lengths = np.array([sum(row) for row in rows], dtype=np.int64)
    values = np.random.default_rng(1)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = values.integers(0, VOCABULARY, length)
    ids = np.where(lengths > 0, np.arange(len(rows)), -1)
    ends = [np.cumsum(row, dtype=np.int32) for row in rows]
    return Batch(tokens, lengths > 0, ends, ids, np.minimum(ids, 0), lengths)


def documents_of(batch):
    for tokens, ends in zip(batch.tokens, batch.doc_ends, strict=True):
        if len(ends):
            yield from np.split(tokens[: ends[-1]], ends[:-1])


def model_of(**changes):
    model = Decoder(
        ModelConfig(
            vocab_size=VOCABULARY,
            max_seq_length=SEQ_LEN,
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
            **changes,
        )
    )
    init_weights(model, 3)
    return model


@pytest.mark.parametrize("micro", [1, 4, 6, 7])
@pytest.mark.parametrize("changes", [{}, {"norm": "layernorm", "mlp": "plain"}])
def test_packed_rows_train_like_their_documents_apart(changes, micro):
    together, alone = model_of(**changes), model_of(**changes)
    batch = TokenBatch.of(packed(), CPU, document_mask=True)
    loss = 0.0
    for inputs, targets, documents in batch.micro_batches(micro):
        part = together(inputs, targets, documents=documents) / batch.num_targets
        part.backward()
        loss += part.item()
    expected, num_targets = 0.0, sum(n - 1 for row in ROWS for n in row)
    assert batch.num_targets == num_targets
    for document in documents_of(packed()):
        tokens = torch.from_numpy(document)[None]
        part = alone(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / num_targets
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    for (name, mine), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_what_padding_holds_does_not_matter():
    batch = packed()
    other = packed()
    for row, length in zip(other.tokens, other.lengths, strict=True):
        row[length:] = 5
    found = []
    for each in (batch, other):
        model = model_of()
        for inputs, targets, documents in TokenBatch.of(
            each, CPU, document_mask=True
        ).micro_batches(6):
            model(inputs, targets, documents=documents).backward()
        found.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        # Sums over an embedding's rows are taken in another order.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(2, 9), max_size=4), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    micro=st.integers(1, 6),
    mask=st.booleans(),
)
def test_targets_are_counted_exactly(rows, spare, micro, mask):
    width = max(2, max(map(sum, rows)) + spare)
    source = packed(rows, width)
    batch = TokenBatch.of(source, CPU, document_mask=mask)
    parts = list(batch.micro_batches(micro))
    targets = torch.cat([part.targets for part in parts])[: len(rows)]
    assert batch.num_targets == sum(int((part.targets != IGNORE).sum()) for part in parts)
    for row, found, tokens in zip(rows, targets, source.tokens, strict=True):
        starts = set(np.cumsum(row).tolist()) if mask else set()
        wanted = [
            tokens[i] if i < sum(row) and i not in starts else IGNORE for i in range(1, width)
        ]
        assert found.tolist() == wanted

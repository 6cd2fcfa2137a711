"""A row of packed documents with the mask is its documents apart: loss and gradients."""

import numpy as np
import pytest
import torch

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.data.reading.stream import Batch
from gristmill.models.attention import _CausalAttention, attend
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.models.loss import IGNORE
from gristmill.models.masks import attention_mask, lengths_within, positions_within
from gristmill.parallel.compile import compile_blocks, missing_for_compile
from gristmill.train.batch import TokenBatch

CPU = torch.device("cpu")
SEQ_LEN = 40
# Where documents end in each row of SEQ_LEN + 1 tokens: also at the first and at the last token.
ENDS = [[1, 2, 17, 41], [9, 40], [], [41]]


def config(**changes):
    settings = {
        "vocab_size": 64,
        "max_seq_length": SEQ_LEN,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
    }
    return ModelConfig(**settings | changes)


def packed_batch():
    tokens = np.random.default_rng(0).integers(0, 64, (len(ENDS), SEQ_LEN + 1))
    ends = [np.array(e, dtype=np.int32) for e in ENDS]
    rows = np.arange(len(ENDS))
    valid, sources = np.ones(len(rows), dtype=bool), np.zeros_like(rows)
    return Batch(tokens, valid, ends, rows, sources, np.full_like(rows, SEQ_LEN + 1))


def apart():
    """The documents of the rows, each by itself."""
    for tokens, ends in zip(packed_batch().tokens, ENDS, strict=True):
        for document in np.split(tokens, ends):
            if len(document) > 1:
                yield torch.from_numpy(document)[None]


def model_of(cfg):
    model = Decoder(cfg)
    init_weights(model, 3)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_of_packed(model, micro=4):
    batch = TokenBatch.of(packed_batch(), CPU, document_mask=True)
    total = 0.0
    for inputs, targets, documents in batch.micro_batches(micro):
        loss = model(inputs, targets, documents=documents)
        loss.backward()
        total += loss.item()
    return total, batch.num_targets


def loss_of_apart(model):
    total, targets = 0.0, 0
    for document in apart():
        loss = model(document[:, :-1].contiguous(), document[:, 1:].contiguous())
        loss.backward()
        total, targets = total + loss.item(), targets + document.shape[1] - 1
    return total, targets


def check_equal(cfg, *, compiled=False, micro=4):
    model, other = model_of(cfg), model_of(cfg)
    if compiled:
        compile_blocks(model)
    loss, targets = loss_of_packed(model, micro)
    expected, expected_targets = loss_of_apart(other)
    assert targets == expected_targets
    assert loss == pytest.approx(expected, rel=1e-5)
    theirs = gradients(other)
    for name, mine in gradients(model).items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("micro", [1, 3, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4, "norm": "layernorm", "mlp": "plain", "parallel_residual": True},
        {"rope_fraction": 0.5, "tie_embeddings": True},
        {"sliding_window": 7, "sliding_pattern": (True, False)},
        {"attention_softcap": 2.0, "sliding_window": 7, "positions": "learned"},
    ],
)
def test_packed_documents_train_like_documents_apart(changes, micro):
    check_equal(config(**changes), micro=micro)


@pytest.mark.slow
@pytest.mark.skipif(missing_for_compile(CPU) is not None, reason="no compiler")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4, "parallel_residual": True},
        {"sliding_window": 7, "sliding_pattern": (True, False), "qk_norm": "head"},
    ],
)
def test_compiled_packed_documents_train_like_documents_apart(changes):
    check_equal(config(**changes), compiled=True)


def test_without_the_mask_documents_do_look_at_each_other():
    model, other = model_of(config()), model_of(config())
    batch = TokenBatch.of(packed_batch(), CPU)
    inputs, targets, documents = next(batch.micro_batches(4))
    assert documents is None
    assert batch.num_targets == len(ENDS) * SEQ_LEN
    assert not bool((targets == IGNORE).any())
    masked = TokenBatch.of(packed_batch(), CPU, document_mask=True)
    _, same_targets, documents = next(masked.micro_batches(4))
    with_mask = other(inputs, same_targets, documents=documents).item()
    assert model(inputs, same_targets).item() != pytest.approx(with_mask, rel=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="dynamic", factor=3.0, original_max_seq_length=4),
        RopeScaling(
            kind="longrope",
            original_max_seq_length=4,
            short_factors=(1.0, 1.5, 2.0, 2.5),
            long_factors=(1.5, 3.0, 5.0, 7.0),
        ),
    ],
)
def test_rotation_that_depends_on_the_length_takes_that_of_each_document(scaling, monkeypatch):
    model = model_of(config(rope_scaling=scaling))
    for block in model.layers:  # scores that differ, so that rotation shows
        torch.nn.init.normal_(block.attn.q.weight, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    lengths = [[3, 6, 7], [16]]
    documents = [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]
    together = model.hidden(tokens, documents=torch.stack(documents))
    for row, parts in enumerate(lengths):
        alone = torch.cat([model.hidden(t[None]) for t in tokens[row].split(parts)], 1)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    of_rows = "gristmill.models.decoder.lengths_within"
    monkeypatch.setattr(of_rows, lambda documents: torch.full_like(documents, 16))
    otherwise = model.hidden(tokens, documents=torch.stack(documents))
    assert (otherwise - together)[0].abs().max() > 1e-3


def test_positions_begin_anew_in_each_document():
    documents = torch.tensor([[0, 0, 1, 1, 1, 4], [2, 3, 3, 3, 3, 3]])
    assert lengths_within(documents).tolist() == [[2, 2, 3, 3, 3, 1], [1, 5, 5, 5, 5, 5]]
    assert positions_within(documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
def test_a_token_sees_itself_and_the_last_of_those_before_it(start, window):
    mask = attention_mask(start, 6, CPU, window=window)
    if mask is None:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    for row in range(6):
        seen = mask[0, 0, row].nonzero().flatten().tolist()
        first = 0 if window is None else max(0, start + row - window + 1)
        assert seen == list(range(first, start + row + 1))


def test_padding_rows_are_no_targets():
    batch = packed_batch()
    batch.valid[2] = False
    masked = TokenBatch.of(batch, CPU, document_mask=True)
    _, targets, _ = next(masked.micro_batches(4))
    assert bool((targets[2] == IGNORE).all())
    assert int((targets != IGNORE).sum()) == masked.num_targets


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [2, 256, 600])
def test_the_written_out_backward_pass_keeps_documents_apart(heads, kv_heads, length):
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (
        torch.randn(2, n, length, 8, generator=generator, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    documents = torch.randint(0, 2, (2, length), generator=generator).cumsum(1)
    documents[0] //= 20  # a row of long documents, and one of short ones
    mask = attention_mask(0, length, CPU, documents=documents)
    written = [x.clone().requires_grad_() for x in (q, k, v)]
    kernel = [x.clone().requires_grad_() for x in (q, k, v)]
    _CausalAttention.apply(*written, mask, 8**-0.5).backward(grad)
    attend(*kernel, mask).backward(grad)
    for mine, theirs in zip(written, kernel, strict=True):
        # The scores are kept in fp32, whatever the inputs are.
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_flex_attention_keeps_documents_apart_on_a_gpu():
    cfg, device = config(hidden_size=64, num_heads=4), torch.device("cuda")
    model, other = model_of(cfg).to(device), model_of(cfg)
    compile_blocks(model)
    batch = TokenBatch.of(packed_batch(), device, document_mask=True)
    inputs, targets, documents = next(batch.micro_batches(len(ENDS)))
    model(inputs, targets, documents=documents).backward()
    expected, _ = loss_of_apart(other)
    theirs = gradients(other)
    for name, mine in gradients(model).items():
        torch.testing.assert_close(mine.cpu(), theirs[name], rtol=1e-3, atol=1e-4, msg=name)

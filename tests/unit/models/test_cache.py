"""Buffers of blocks with a sliding window, which are shorter than the texts that go through."""

import random

import pytest
import torch
from tests.unit.models.test_decoding import SHAPES, tiny

from gristmill.config.model import RopeScaling
from gristmill.models import cache as caches
from gristmill.models.batching import Batch
from gristmill.models.cache import KVCache, LayerCache, RowsCache, kv_cache_bytes
from gristmill.models.decoding import Context
from gristmill.models.forest import Beginning, Forest, forest_hidden
from gristmill.models.zoo import get

CONTEXT = 96
WINDOWS = {
    "some": SHAPES["windows"],
    "all": {"num_kv_heads": 2, "num_layers": 2, "sliding_window": 3},
    "one token": {"num_layers": 2, "sliding_window": 1, "sliding_pattern": (False, True)},
}
close = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(params=WINDOWS)
def model(request, monkeypatch):
    """A model whose buffers are a tenth of its context."""
    monkeypatch.setattr(caches, "PREFILL_TOKENS", 4)
    monkeypatch.setattr(caches, "MARGIN", 3)
    return tiny(WINDOWS[request.param], CONTEXT, scale=2.0)


def some_ids(count, seed=0):
    return random.Random(seed).choices(range(64), k=count)


def alone(model, ids):
    """Logits behind a text, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[:, -1]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_length_are_the_whole(model, seed):
    tokens = torch.tensor([some_ids(CONTEXT, 1), some_ids(CONTEXT, 2)])
    rng, sizes = random.Random(seed), []
    while sum(sizes) < CONTEXT:
        sizes.append(min(rng.choice([1, 1, 1, 2, 3, 4, 9, 17]), CONTEXT - sum(sizes)))
    cache = KVCache(model.config, 2, CONTEXT)
    cache.context = CONTEXT
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), **close)
    assert all(len(block) == len(model.config.cached_heads) for block in cache.blocks)
    held = {block[0].shape[2] for block in cache.blocks}
    assert min(held) == model.config.sliding_window + 3 + 4
    assert max(held) == (CONTEXT if None in model.config.windows else min(held))


@torch.no_grad()
def test_rows_come_and_go_and_wait(model):
    """Each row moves its positions when its own buffer is full, whatever the others do."""
    batch, rng, held = Batch(model, 4, CONTEXT - 1), random.Random(5), {}
    for step in range(300):
        free = [row for row in range(4) if row not in held]
        if free and rng.random() < 0.2:
            row = rng.choice(free)
            held[row] = some_ids(rng.choice([1, 5, 30, 60]), step)
            torch.testing.assert_close(batch.put(row, held[row]), alone(model, held[row]), **close)
        rows = [row for row in held if rng.random() < 0.8]
        rng.shuffle(rows)
        if rows:
            for row in rows:
                held[row].append(rng.randrange(64))
            logits = batch.step(rows, [held[row][-1] for row in rows])
            for row, got in zip(rows, logits, strict=True):
                if step % 5 == 0 or len(held[row]) % 7 == 0:
                    torch.testing.assert_close(got[None], alone(model, held[row]), **close)
        for row in [row for row in held if len(held[row]) == CONTEXT - 1 or rng.random() < 0.01]:
            batch.drop(row)
            del held[row]


@torch.no_grad()
def test_pieces_turn_as_the_whole_text_does(monkeypatch):
    monkeypatch.setattr(caches, "PREFILL_TOKENS", 4)
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_max_seq_length=8)
    model = tiny({**WINDOWS["all"], "rope_scaling": scaling}, CONTEXT)
    tokens, cache = torch.tensor([some_ids(60)]), KVCache(model.config, 1, CONTEXT)
    cache.context = 60
    torch.testing.assert_close(model(tokens, cache=cache), model(tokens), **close)
    cache.length = 0
    torch.testing.assert_close(model(tokens[:, :20], cache=cache), model(tokens[:, :20]), **close)


def read_lengths(model):
    lengths = []
    model.embed.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


@torch.no_grad()
def test_a_text_is_shortened_and_changed_at_any_place(model):
    context, ids, rng = Context(model), some_ids(70), random.Random(3)
    for number in range(60):
        torch.testing.assert_close(context.read(ids), alone(model, ids), **close)
        cut = rng.choice([1, 2, 3, 4, 20, len(ids)])
        ids = [*ids[: len(ids) - cut], *some_ids(rng.choice([1, 2, 12, 30]), number)][:CONTEXT]


@torch.no_grad()
def test_a_text_a_little_shorter_is_not_read_again(model):
    context, ids = Context(model), some_ids(70)
    context.read(ids)
    lengths = read_lengths(model)
    context.read([*ids[:-2], 1])  # the last three are new, one behind the margin
    assert sum(lengths) == 1
    lengths.clear()
    context.read([*ids[:20], 1, 2])
    assert sum(lengths) == 22  # from the beginning: the window is gone


@torch.no_grad()
def test_what_a_row_held_is_gone_on_from_where_its_window_is_kept(model):
    batch, ids = Batch(model, 2, CONTEXT), some_ids(50)
    batch.put(1, ids)
    batch.drop(1)
    other = some_ids(9, 1)
    batch.put(0, other)
    for _ in range(40):  # the dropped row lies beside those that step
        other.append(7)
        batch.step([0], [7])
    assert batch.kept(1, 20) == 0
    assert batch.kept(1, 48) == 48
    new = [*ids[:48], 9, 9, 9]
    *_, logits = batch.read(1, new, held=48)
    torch.testing.assert_close(logits, alone(model, new), **close)


def conversation(context):
    """Texts that grow, with replies."""
    for count in (60, 70, 80, 90):
        context.read(some_ids(count, count))
        for token in range(4):
            context.add(torch.tensor([token]), token)


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "time"),
    [("_begin_at", 0), ("_begin_at", 3), ("copy_from", 0), ("append", 0), ("append", 9)],
)
def test_what_an_interrupt_leaves_is_read_again(model, monkeypatch, place, time):
    """Whatever was being written: buffers that move, that grow, a block's new positions."""
    context, ids = Context(model), some_ids(30)
    context.read(ids)
    owner = LayerCache if place == "append" else KVCache
    real, times = getattr(owner, place), iter(range(1000))

    def stop(*args):
        result = real(*args)
        if next(times) == time:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stop)
        with pytest.raises(KeyboardInterrupt):
            conversation(context)
    for again in (ids, some_ids(80, 80), [*some_ids(80, 80), 5]):
        torch.testing.assert_close(context.read(again), alone(model, again), **close)


@torch.no_grad()
def test_prompts_of_unlike_length_beside_each_other(model, monkeypatch):
    for module in ("cache", "batching"):
        monkeypatch.setattr(f"gristmill.models.{module}.PREFILL_TOKENS", 50)
    prompts = [some_ids(count, count) for count in (25, 17, 19, 13, 12, 36, 5)]
    batch = Batch(model, len(prompts), CONTEXT)
    rows = list(range(len(prompts)))
    logits = batch.put_all(rows, prompts)
    for _ in range(50):  # the buffers move one after the other
        following = batch.step(rows, rows)
    for row, ids in enumerate(prompts):
        torch.testing.assert_close(logits[row][None], alone(model, ids), **close)
        whole = [*ids, *[row] * 50]
        torch.testing.assert_close(following[row][None], alone(model, whole), **close)


@torch.no_grad()
def test_texts_behind_a_beginning_longer_than_the_buffers(model):
    beginning, ends = some_ids(60), [some_ids(6, 1), some_ids(6, 2)]
    count = torch.arange(6)
    forest = Forest(
        torch.tensor(ends),
        count.expand(2, 6),
        torch.full((2, 6), 6),
        torch.full((2, 6), 66),
    )
    shared = Beginning(model, torch.tensor([beginning]), torch.float32)
    hidden = forest_hidden(model, forest, shared)
    for got, end in zip(hidden, ends, strict=True):
        whole = model.hidden(torch.tensor([[*beginning, *end]]))
        torch.testing.assert_close(got[None], whole[:, 60:], **close)


def test_memory_is_for_windows_not_for_texts():
    gemma, width = get("Gemma-3-1b-it"), 2 * 256 * 2
    long, short = (kv_cache_bytes(gemma, 1, length) for length in (32768, 1024))
    assert gemma.windows.count(512) == 22
    assert long == (4 * 32768 + 22 * (512 + 128 + 1024)) * width
    assert short == 26 * 1024 * width


@torch.no_grad()
def test_a_token_behind_what_is_not_kept_is_refused(model):
    cache = KVCache(model.config, 1, CONTEXT)
    model(torch.tensor([some_ids(70)]), cache=cache)
    with pytest.raises(AssertionError, match="are there"):
        cache.length = 20
    with pytest.raises(AssertionError, match="are there"):
        RowsCache(model.config, cache, [0], [20])
    with pytest.raises(AssertionError, match="no room for 100 positions"):
        model(torch.tensor([some_ids(30)]), cache=cache)
    assert cache.length == 70

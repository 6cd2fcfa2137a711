import pytest
import torch
from tests.unit.models.test_decoding import SHAPES, tiny

from gristmill.config.use_commands import Sampling
from gristmill.models.batching import Batch, generate_batch
from gristmill.models.decoding import Context, generate_tokens
from gristmill.util.errors import UserError

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [20, 21, 22], [50, 40, 30, 20, 10], [8, 8], [33]]


def alone(model, prompt, count=12, **options):
    return list(generate_tokens(model, prompt, max_new_tokens=count, **options))


def collected(events):
    ids, ends = {}, {}
    for number, item in events:
        assert number not in ends
        if isinstance(item, str):
            ends[number] = item
        else:
            ids.setdefault(number, []).append(item)
    return ids, ends


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_ids_are_those_of_each_prompt_alone(shape):
    model = tiny(shape)
    sampling = Sampling(max_new_tokens=12, temperature=0)
    ids, ends = collected(generate_batch(Batch(model, 3, 40), PROMPTS, sampling))
    for number, prompt in enumerate(PROMPTS):
        assert ids[number] == alone(model, prompt, temperature=0)
    assert set(ends.values()) == {"max_new_tokens"}


def test_rows_come_and_go_and_wait():
    model = tiny("windows")
    batch = Batch(model, 4, 30)
    held = {0: [*PROMPTS[0]], 2: [*PROMPTS[2]], 3: [*PROMPTS[3]]}
    for row, ids in held.items():
        torch.testing.assert_close(batch.put(row, ids), Context(model).read(ids))

    def step(rows, tokens):
        logits = batch.step(rows, tokens)
        for row, token, got in zip(rows, tokens, logits, strict=True):
            held[row].append(token)
            torch.testing.assert_close(got, Context(model).read(held[row])[0], atol=1e-4, rtol=1e-4)

    step([3, 0], [11, 12])
    step([2], [13])
    batch.drop(0)
    step([2, 3], [14, 15])
    held[1] = [5, 5, 5]
    batch.put(1, held[1])
    for token in range(6):
        step([3, 2, 1], [token, token + 20, token + 40])


def test_rows_below_those_in_use_are_not_computed():
    model = tiny()
    batch, counts = Batch(model, 6, 40), []
    for row in (0, 3, 5):
        batch.put(row, PROMPTS[0])
    model.layers[0].register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    logits = batch.step([5, 3], [11, 11])
    assert counts == [3]
    torch.testing.assert_close(*logits)


def test_each_prompt_has_choices_of_its_own():
    model = tiny(scale=1.0)
    sampling = Sampling(max_new_tokens=12, top_k=20, min_p=0.01, seed=5)
    together, _ = collected(generate_batch(Batch(model, 4, 40), PROMPTS, sampling))
    for number, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(5 + number)
        options = {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "generator": generator}
        assert together[number] == alone(model, prompt, **options)


def test_why_each_prompt_ended():
    model = tiny()
    first = alone(model, PROMPTS[0], temperature=0)
    end = first[4]
    sampling = Sampling(max_new_tokens=12, temperature=0)
    batch = Batch(model, 2, 16)
    prompts = [PROMPTS[0], list(range(12))]
    ids, ends = collected(generate_batch(batch, prompts, sampling, eos_ids={end}))
    assert ids[0] == first[: first.index(end)]
    assert ends[0] == "eos"
    assert ends[1] == "context"
    assert len(ids[1]) == 4
    assert batch.lengths == [0, 0]


def test_a_penalty_is_for_a_row_and_what_it_has_seen():
    model = tiny()
    options = {"temperature": 0, "repetition_penalty": 1.3}
    sampling = Sampling(max_new_tokens=12, **options)
    ids, _ = collected(generate_batch(Batch(model, 3, 40), PROMPTS, sampling))
    for number, prompt in enumerate(PROMPTS):
        assert ids[number] == alone(model, prompt, **options)
    assert ids[0] != alone(model, PROMPTS[0], temperature=0)


def test_closing_early_frees_the_rows():
    batch = Batch(tiny(), 2, 40)
    events = generate_batch(batch, PROMPTS, Sampling(max_new_tokens=12))
    next(events)
    assert batch.lengths != [0, 0]
    events.close()
    assert batch.lengths == [0, 0]


def test_long_prompts_are_read_in_pieces(monkeypatch):
    model = tiny("windows")
    whole = Context(model).read(list(range(30)))
    lengths = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    hidden = type(model).hidden
    monkeypatch.setattr(
        type(model),
        "hidden",
        lambda self, tokens, **more: (
            lengths.append(tokens.shape[1]) or hidden(self, tokens, **more)
        ),
    )
    monkeypatch.setattr("gristmill.models.batching.PREFILL_TOKENS", 8)
    logits = Batch(model, 2, 40).put(1, list(range(30)))
    assert lengths == [8, 8, 8, 6]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_read_side_by_side(shape):
    model = tiny(shape)
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    batch = Batch(model, 6, 40)
    prompts = [PROMPTS[0], [*PROMPTS[0][:7]], [*PROMPTS[0], 9], [5], PROMPTS[0], PROMPTS[3]]
    rows = [0, 1, 2, 3, 5, 4]
    logits = batch.put_all(rows, prompts)
    assert len(calls) == 3  # one by one: the short one, and those whose rows are apart
    following = batch.step(rows, [11, 12, 13, 14, 15, 16])
    for number, prompt in enumerate(prompts):
        context = Context(model)
        expected = context.read(prompt)[0]
        torch.testing.assert_close(logits[number], expected, atol=1e-4, rtol=1e-4)
        expected = context.read([*prompt, 11 + number])[0]
        torch.testing.assert_close(following[number], expected, atol=1e-4, rtol=1e-4)


def test_wrong_uses_are_refused():
    batch = Batch(tiny(context=16), 2, 99)
    with pytest.raises(UserError, match=r"min_p must be between 0 and 1 \(2"):
        generate_batch(batch, PROMPTS, Sampling(min_p=2.0))
    with pytest.raises(UserError, match="repetition_penalty must be above 0"):
        generate_batch(batch, PROMPTS, Sampling(repetition_penalty=0.0))
    with pytest.raises(UserError, match="no room"):
        list(generate_batch(batch, [[1] * 16], Sampling()))


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_in_parts_while_others_step_and_again_behind_what_was_held(shape):
    model = tiny(shape)
    batch = Batch(model, 3, 40)
    other, ids = [9, 8, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    batch.put(2, other)

    def step():
        other.append(len(other) % 7)
        logits = batch.step([2], other[-1:])
        alone = Context(model).read(other)
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)

    for held in (0, 8):
        parts = 0
        for got in batch.read(1, ids, held=held, part_tokens=3):
            parts, logits = parts + 1, got
            step()
        assert parts == (4 if held == 0 else 2)
        torch.testing.assert_close(logits, Context(model).read(ids), atol=1e-4, rtol=1e-4)
        batch.drop(1)
        step()
        # The next text begins alike and goes on otherwise.
        ids = [*ids[:8], 30, 31, 32, 33]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["grouped", "windows", "latent", "experts"])
def test_compiled_is_eager(shape, monkeypatch):
    monkeypatch.setattr("gristmill.models.cache.PREFILL_TOKENS", 8)
    monkeypatch.setattr("gristmill.models.cache.MARGIN", 3)
    model = tiny(shape)
    sampling = Sampling(max_new_tokens=30, temperature=0)
    expected = collected(generate_batch(Batch(model, 3, 50), PROMPTS, sampling))
    batch = Batch(model, 3, 50)
    if reason := batch.compile():
        pytest.skip(f"no compiler here: {reason}")
    with torch.compiler.set_stance("fail_on_recompile"):
        batch.put(0, PROMPTS[0])
        batch.step([0], [1])  # one row in use, and longer texts, are the same code
    batch.drop(0)
    assert collected(generate_batch(batch, PROMPTS, sampling)) == expected

"""What is computed together equals each text computed alone."""

import random

import pytest
import torch

from gristmill.measure import rows, score
from gristmill.measure.score import Query, Scorer
from gristmill.util.errors import RunError, UserError

from .models import SHAPES, loaded, tiny


@torch.no_grad()
def alone(model, query, limit=64):
    """The answer from one plain forward of the one text."""
    whole = [*query.context, *query.continuation][-(limit + 1) :]
    count = len(query.continuation)
    hidden = model.hidden(torch.tensor([whole[:-1]]))[0, -count:]
    logits = torch.nn.functional.linear(hidden, model.head_rows, model.head_bias)
    if (cap := model.config.logit_softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    wanted = torch.tensor(query.continuation)
    found = logits.log_softmax(-1).gather(1, wanted.unsqueeze(1))
    return float(found.sum()), bool((logits.argmax(-1) == wanted).all())


def questions(seed=0, count=8, longest=20):
    """Contexts with four answers each, of one token and of more; some contexts begin alike."""
    rng = random.Random(seed)
    start = [rng.randrange(59) for _ in range(6)]
    found = []
    for _ in range(count):
        context = start[: rng.randrange(7)] + [
            rng.randrange(59) for _ in range(rng.randrange(1, longest))
        ]
        for _ in range(4):
            found.append(
                Query(context, [rng.randrange(59) for _ in range(rng.choice((1, 1, 2, 6)))])
            )
    return found


def check(model, queries, answers, tolerance=2e-5):
    for query, answer in zip(queries, answers, strict=True):
        expected, greedy = alone(model, query, model.config.max_seq_length)
        assert answer.log_likelihood == pytest.approx(expected, abs=tolerance, rel=tolerance)
        assert answer.is_greedy == greedy


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_single_texts(shape):
    model = tiny(shape)
    queries = questions()
    scorer = Scorer(loaded(model))
    check(model, queries, scorer.answers(queries))
    shared = scorer.work.computed < 0.6 * scorer.work.tokens
    assert shared == (shape != "dynamic")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_common_beginning_is_read_once(shape, monkeypatch):
    monkeypatch.setattr(rows, "LONG_BEGINNINGS", (16,))
    monkeypatch.setattr(score, "CPU_TOKENS", 60)
    model = tiny(shape)
    rng = random.Random(3)
    examples = [rng.randrange(59) for _ in range(25)]
    queries = [Query([*examples, *q.context], q.continuation) for q in questions(4, longest=12)]
    read = []
    begin = Scorer._read
    monkeypatch.setattr(
        Scorer, "_read", lambda self, ids: read.append(len(ids)) or begin(self, ids)
    )
    check(model, queries, Scorer(loaded(model)).answers(queries))
    assert (max(read) >= 25) == (shape != "dynamic")


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_batch_size_changes_nothing(batch_size):
    model = tiny()
    queries = questions(7)
    check(model, queries, Scorer(loaded(model), batch_size).answers(queries))


def test_a_greedy_answer_is_known():
    model = tiny()
    context = [5, 6, 7]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([context]))[0, -1].argmax())
    yes, no = Scorer(loaded(model)).answers(
        [Query(context, [likeliest]), Query(context, [(likeliest + 1) % 59])]
    )
    assert yes.is_greedy
    assert not no.is_greedy
    assert yes.log_likelihood > no.log_likelihood


def test_equal_logits_count_for_the_first():
    model = tiny()
    with torch.no_grad():
        model.norm.weight.zero_()
    answers = Scorer(loaded(model)).answers([Query([1], [0]), Query([1], [4])])
    # Without a norm's weight all logits are 0: the first of all tokens counts.
    assert [a.is_greedy for a in answers] == [True, False]


def test_the_beginning_is_cut_where_a_text_is_too_long():
    model = tiny(context=16)
    scorer = Scorer(loaded(model))
    long = Query(list(range(30)), [1, 2, 3])
    fits = Query(list(range(14)), [1, 2, 3])
    check(model, [long, fits], scorer.answers([long, fits]))
    assert scorer.work.shortened == 1


def test_no_continuation_is_certain():
    answers = Scorer(loaded(tiny())).answers([Query([3], []), Query([3], [4])])
    assert answers[0] == (0.0, True)
    assert answers[1].log_likelihood < 0


def test_nothing_to_do():
    assert Scorer(loaded(tiny())).answers([]) == []


def test_an_answer_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="20 tokens does not fit into the model's context of 16"):
        Scorer(loaded(tiny(context=16))).answers([Query([1], list(range(20)))])


def test_rows_without_tokens_take_part():
    """As in other tools: log-likelihoods are compared with theirs."""
    model = tiny("parallel")
    assert model.config.token_ids < model.config.vocab_size
    query = Query([1, 2], [3])
    (answer,) = Scorer(loaded(model)).answers([query])
    hidden = model.hidden(torch.tensor([[1, 2]]))[0, -1]
    logits = torch.nn.functional.linear(hidden, model.head_rows, model.head_bias)
    assert len(logits) == model.config.vocab_size
    expected = float(logits.log_softmax(-1)[3].detach())
    assert answer.log_likelihood == pytest.approx(expected, abs=1e-5)


def test_mixed_precision_is_near():
    model = tiny()
    queries = questions(9)
    found = Scorer(loaded(model, "bf16-mixed")).answers(queries)
    exact = Scorer(loaded(model)).answers(queries)
    differences = [abs(a.log_likelihood - b.log_likelihood) for a, b in zip(found, exact)]
    assert 0 < max(differences) < 0.05 * max(abs(b.log_likelihood) for b in exact)


def test_too_little_memory_takes_less_at_a_time(monkeypatch):
    model = tiny()
    queries = questions(2, count=40)
    room = 300
    sizes = []
    hidden = score.forest_hidden

    def limited(model, forest, beginning=None):
        sizes.append(forest.tokens.numel())
        if forest.tokens.numel() > room:
            raise torch.OutOfMemoryError("no room")
        return hidden(model, forest, beginning)

    monkeypatch.setattr(score, "forest_hidden", limited)
    done = []
    check(model, queries, Scorer(loaded(model)).answers(queries, done.append))
    assert sum(map(len, done)) == len(queries)
    assert max(sizes) > room
    room = 0
    with pytest.raises(RunError, match="memory is too small for a text of"):
        Scorer(loaded(model)).answers(queries)


def test_logits_are_made_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(score, "LOGIT_BYTES", 64 * 4 * 3)
    monkeypatch.setattr(score, "CACHED_LOGITS", 64)
    model = tiny()
    queries = questions(5)
    check(model, queries, Scorer(loaded(model)).answers(queries))


def test_answers_are_told_as_they_come():
    model, done = tiny(), []
    queries = [*questions(), *questions()]  # the second time the same
    Scorer(loaded(model), 2).answers(queries, done.append)
    assert all(done)
    answers = Scorer(loaded(model), 2).answers(queries)
    assert dict(pair for found in done for pair in found) == dict(enumerate(answers))
    assert sum(map(len, done)) == len(queries)

"""Many replies at a time are those of each alone, and the thread that writes them lasts."""

import asyncio
import threading

import pytest
import torch

from gristmill.infer.load import load
from gristmill.infer.serve import engine as engine_module
from gristmill.infer.serve.engine import (
    Closing,
    Engine,
    Full,
    Gone,
    ModelFailed,
    num_shared,
)
from gristmill.infer.serve.reply import Ask, Reply

from .conftest import Slow


@pytest.fixture(scope="module")
def loaded(long_model):
    return load(long_model, "cpu", "32-true")


def ask(loaded, prompt, length=12, **more):
    settings = {"temperature": 0.0, **more}
    ids = loaded.prompt_ids(prompt)
    return Ask(ids=ids, max_new_tokens=length, stop_ids=frozenset(), goes_on=True, **settings)


class World:
    """An engine with rows that can be slow and can fail."""

    def __init__(self, loaded, rows=3, queue_size=20, step_s=0.0):
        self.slow = Slow(loaded.batch(rows, 128), step_s)
        self.engine = Engine(
            lambda: self.slow, loaded.tokenizer, loaded.device, rows=rows, queue_size=queue_size
        )

    def __enter__(self):
        self.engine.start()
        return self.engine

    def __exit__(self, *_):
        self.engine.stop()
        assert not self.engine._thread.is_alive()


async def texts(ticket, count):
    said = [""] * count
    while ticket.has_left:
        number, piece = await ticket.next()
        said[number] += piece.text
    return said


def alone(loaded, asked):
    """The same reply by the engine of one row."""

    async def main():
        return await texts(engine.submit([asked]), 1)

    with World(loaded, rows=1) as engine:
        return asyncio.run(main())[0]


def test_company_changes_nothing(loaded):
    prompts = ["the mill", "a", "old Anna counted sacks of rye", "zzz", "water ran under", "b c"]
    asks = [ask(loaded, prompt, 5 + 6 * i) for i, prompt in enumerate(prompts)]
    asks += [ask(loaded, prompt, 10, temperature=1.3, seed=i) for i, prompt in enumerate(prompts)]
    asks.append(ask(loaded, "a", 10, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=3))
    asks.append(ask(loaded, "a a a", 10, repetition_penalty=1.5))

    async def main():
        # Some at once, and some while others are under way.
        first = engine.submit(asks[:5])
        number, piece = await first.next()
        second = engine.submit(asks[5:])
        said = [*(await texts(first, 5)), *(await texts(second, len(asks) - 5))]
        said[number] = piece.text + said[number]
        return said

    with World(loaded) as engine:
        together = asyncio.run(main())
    assert together == [alone(loaded, asked) for asked in asks]
    assert all(together)


def test_the_next_turn_is_read_from_where_the_last_one_ended(loaded):
    world = World(loaded, rows=3)
    texts_of = {}

    async def main():
        first = ask(loaded, "once upon a time there was a mill", 10)
        said = (await texts(engine.submit([first]), 1))[0]
        other = ask(loaded, "something else altogether", 4)
        await texts(engine.submit([other]), 1)
        reply = loaded.tokenizer.encode(said)
        again = Ask(
            ids=[*first.ids, *reply, *loaded.tokenizer.encode(" and")],
            max_new_tokens=10,
            stop_ids=frozenset(),
            temperature=0.0,
            goes_on=True,
        )
        texts_of[0] = again, (await texts(engine.submit([again]), 1))[0]
        return len(first.ids)

    with world as engine:
        length = asyncio.run(main())
    asked, text = texts_of[0]
    # The two texts before it, and now all but the last token and the new ones. What the model
    # wrote may be encoded otherwise than it was written.
    assert world.slow.read_from[:2] == [0, 0]
    assert world.slow.read_from[2] >= length
    assert text == alone(loaded, asked)


def test_what_need_not_be_read():
    held = list(range(50))
    assert num_shared(held, list(range(40)) + [7, 8]) == 40
    assert num_shared(held, list(range(50))) == 49
    assert num_shared(held, list(range(15)) + [99]) == 0
    assert num_shared(held, list(range(60))) == 50
    assert num_shared([], [1]) == 0


def test_others_go_on_while_a_long_prompt_is_read(loaded, monkeypatch):
    monkeypatch.setattr(engine_module, "PART_TOKENS", 4)
    monkeypatch.setattr(engine_module, "READING_S", 0.0)
    world = World(loaded, rows=2)
    steps = []
    step = world.slow.step
    world.slow.step = lambda rows, tokens: steps.append(list(rows)) or step(rows, tokens)

    async def main():
        with world as engine:
            short = engine.submit([ask(loaded, "a", 60)])
            await short.next()
            long = engine.submit([ask(loaded, "b" * 60, 8)])
            return await texts(long, 1)

    assert asyncio.run(main()) == [alone(loaded, ask(loaded, "b" * 60, 8))]
    before = steps[: next(i for i, rows in enumerate(steps) if len(rows) == 2)]
    assert len(before) >= 15


def test_a_full_queue_takes_all_or_nothing(loaded):
    async def main():
        with World(loaded, rows=1, queue_size=2, step_s=0.01) as engine:
            engine.submit([ask(loaded, "a", 100)] * 3)
            with pytest.raises(Full):
                engine.submit([ask(loaded, "a")])
            assert engine.num_waiting + engine.num_active == 3

    asyncio.run(main())


def test_cancel_frees_row_and_queue(loaded):
    async def main():
        with World(loaded, rows=1, queue_size=2, step_s=0.01) as engine:
            first = engine.submit([ask(loaded, "a", 100)])
            await first.next()
            second = engine.submit([ask(loaded, "a", 100)])
            second.cancel()
            with pytest.raises(Gone):
                await second.next()
            assert engine.num_waiting == 0
            first.cancel()
            third = engine.submit([ask(loaded, "a", 3)])
            assert await texts(third, 1) != [""]

    asyncio.run(main())


def test_drain_ends_what_waits_and_not_what_is_written(loaded):
    async def main():
        with World(loaded, rows=1, step_s=0.005) as engine:
            first = engine.submit([ask(loaded, "a", 20)])
            await first.next()
            second = engine.submit([ask(loaded, "a")])
            engine.drain()
            with pytest.raises(Closing):
                await second.next()
            with pytest.raises(Closing):
                engine.submit([ask(loaded, "a")])
            assert await texts(first, 1) != [""]

    asyncio.run(main())


def test_stop_gives_up_what_is_written(loaded):
    async def main():
        with World(loaded, rows=1, step_s=0.01) as engine:
            ticket = engine.submit([ask(loaded, "a", 100)])
            await ticket.next()
            await asyncio.to_thread(engine.stop)
            with pytest.raises(Closing):
                await texts(ticket, 1)
            assert not engine.is_alive

    asyncio.run(main())


def test_failures_end_the_replies_they_hit(loaded, capsys):
    world = World(loaded, rows=2, step_s=0.005)

    async def main():
        with world as engine:
            world.slow.failure = ValueError("no such row\nat all")
            ticket = engine.submit([ask(loaded, "a")])
            with pytest.raises(ModelFailed, match=r"\(ValueError: no such row\)"):
                await texts(ticket, 1)
            both = engine.submit([ask(loaded, "a", 50), ask(loaded, "b", 50)])
            await both.next()
            world.slow.failure = MemoryError()
            with pytest.raises(ModelFailed):
                await texts(both, 2)
            assert await texts(engine.submit([ask(loaded, "a")]), 1) != [""]

    asyncio.run(main())
    assert "no such row" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_next_token_fails_alone(loaded, capsys, temperature):
    world = World(loaded, rows=2)
    step = world.slow.step
    asks = [ask(loaded, prompt, 20, temperature=temperature, seed=3) for prompt in ("a", "b")]

    def broken(rows, tokens):
        logits = step(rows, tokens).clone()
        if len(rows) == 2:
            logits[rows.index(max(rows))] = float("nan")
        return logits

    world.slow.step = broken

    async def main():
        with world as engine:
            tickets = [engine.submit([one]) for one in asks]
            said = await asyncio.gather(
                *(texts(ticket, 1) for ticket in tickets), return_exceptions=True
            )
            failed = [one for one in said if isinstance(one, ModelFailed)]
            assert len(failed) == 1
            assert "not finite" in str(failed[0])
            return [(i, one) for i, one in enumerate(said) if not isinstance(one, Exception)]

    ((number, text),) = asyncio.run(main())
    assert text == [alone(loaded, asks[number])]
    assert "not finite" in capsys.readouterr().err


def test_a_reply_that_cannot_take_its_token_fails_alone(loaded, monkeypatch):
    put = Reply.put

    def broken(self, token_id, logits):
        if self.ask.seed == 1 and self.num_tokens == 3:
            raise ValueError("no such token")
        return put(self, token_id, logits)

    monkeypatch.setattr(Reply, "put", broken)

    async def main():
        with World(loaded, rows=2) as engine:
            tickets = [engine.submit([ask(loaded, "a", 10, seed=seed)]) for seed in (1, 2)]
            with pytest.raises(ModelFailed, match="no such token"):
                await texts(tickets[0], 1)
            return await texts(tickets[1], 1)

    assert asyncio.run(main()) == [alone(loaded, ask(loaded, "a", 10, seed=2))]


def test_an_engine_that_cannot_start_says_why(loaded):
    def fail():
        raise MemoryError("too little")

    engine = Engine(fail, loaded.tokenizer, loaded.device, rows=1, queue_size=1)
    with pytest.raises(MemoryError, match="too little"):
        engine.start()
    assert not engine.is_alive


def test_an_engine_that_dies_tells_all(loaded, capsys):
    world = World(loaded, rows=1, step_s=0.01)

    async def main():
        with world as engine:
            first = engine.submit([ask(loaded, "a", 100)])
            await first.next()
            second = engine.submit([ask(loaded, "a", 100)])
            world.slow.failure = SystemExit("killed")
            for ticket in (first, second):
                with pytest.raises(Closing):
                    await texts(ticket, 1)
            assert not engine.is_alive
            with pytest.raises(Closing):
                engine.submit([ask(loaded, "a")])

    asyncio.run(main())
    assert "The engine has failed" in capsys.readouterr().err


def test_a_reply_whose_asker_has_no_loop_any_more(loaded):
    async def main(engine):
        await engine.submit([ask(loaded, "a", 50)]).next()

    with World(loaded, rows=1, step_s=0.005) as engine:
        asyncio.run(main(engine))  # leaves without a word
        thread = threading.Thread(target=asyncio.run, args=(main(engine),))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def put(reply, token_ids, size=260):
    """(text, finish, texts of reported tokens) of all pieces joined."""
    text, finish, tokens = "", None, []
    for token_id in token_ids:
        logits = torch.zeros(1, size)
        logits[0, token_id] = 5.0
        if piece := reply.put(token_id, logits):
            text += piece.text
            finish = piece.finish
            tokens += [token.text for token in piece.tokens]
            if finish:
                break
    return text, finish, tokens


def test_tokens_behind_a_stop_are_not_reported(loaded):
    ids = loaded.tokenizer.encode("abcdefgh")
    asked = Ask(
        ids=[1], max_new_tokens=99, stop_ids=frozenset(), stops=("def", "xy"), num_logprobs=0
    )
    reply = Reply(asked, loaded.tokenizer, loaded.device)
    assert put(reply, ids) == ("abc", "stop", ["a", "b", "c"])
    assert reply.num_tokens == 6


def test_what_a_stop_withheld_comes_at_the_end(loaded):
    ids = loaded.tokenizer.encode("abcde")
    for stop_ids, end in ((frozenset([0]), "stop"), (frozenset(), "length")):
        asked = Ask(ids=[1], max_new_tokens=5, stop_ids=stop_ids, stops=("def",), num_logprobs=1)
        reply = Reply(asked, loaded.tokenizer, loaded.device)
        given = [*ids[:4], 0] if stop_ids else ids
        text = "abcd" if stop_ids else "abcde"
        assert put(reply, given) == (text, end, list(text))


def test_characters_of_several_tokens_come_whole(loaded):
    ids = loaded.tokenizer.encode("é世")
    assert len(ids) == 5
    asked = Ask(ids=[1], max_new_tokens=5, stop_ids=frozenset(), num_logprobs=0)
    reply = Reply(asked, loaded.tokenizer, loaded.device)
    pieces = [reply.put(i, torch.zeros(1, 260)) for i in ids]
    assert [piece and piece.text for piece in pieces] == [None, "é", None, None, "世"]
    assert [len(piece.tokens) for piece in pieces if piece] == [2, 3]
    assert [piece.num_tokens for piece in pieces if piece] == [2, 3]


def test_penalties_follow_the_formulas(loaded):
    asked = Ask(
        ids=[1],
        max_new_tokens=9,
        stop_ids=frozenset(),
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={7: 3.0},
    )
    reply = Reply(asked, loaded.tokenizer, loaded.device)
    for token_id in (5, 5, 6):
        reply.put(token_id, torch.zeros(1, 260))
    logits = torch.ones(1, 260)
    bent = reply.bend(logits)
    assert bent[0, 5] == 1 - 0.5 - 2 * 0.25
    assert bent[0, 6] == 1 - 0.5 - 0.25
    assert bent[0, 7] == 4
    assert logits.eq(1).all()  # log-probabilities are of these

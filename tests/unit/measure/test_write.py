"""What the model writes for tasks: by their settings, up to what ends it."""

import pytest
import torch

from gristmill.infer.load import load
from gristmill.measure.write import Prompt, Writer
from gristmill.util.errors import UserError

from .models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("model")), "cpu", "32-true")


@torch.no_grad()
def greedy(model, text, count):
    """The likeliest continuation, one plain forward a token."""
    ids = model.tokenizer.encode(text, bos=True)
    start = len(ids)
    for _ in range(count):
        token = int(model.model(torch.tensor([ids]))[0, -1].argmax())
        if token in model.tokenizer.stop_ids:
            break
        ids.append(token)
    return model.tokenizer.decode(ids[start:])


TEXTS = ["the mill", "a", "water ran under", "sacks of rye for every farmer"]


@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_prompts_are_continued_greedily_in_their_order(model, batch_size):
    settings = {"max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    done = []
    prompts = [Prompt(text, settings) for text in TEXTS]
    written = Writer(model, batch_size).texts(prompts, lambda *text: done.append(text))
    assert written == [greedy(model, text, 6) for text in TEXTS]
    assert sorted(done) == list(enumerate(written))


def test_the_first_of_the_stops_ends_a_text(model):
    whole = greedy(model, "a", 12)
    stop = whole[3:5]
    (written,) = Writer(model, "auto").texts(
        [Prompt("a", {"until": [stop, "\x00", ""], "max_gen_toks": 12})]
    )
    assert written == whole[: whole.index(stop)]
    (written,) = Writer(model, "auto").texts([Prompt("a", {"until": stop, "max_tokens": 30})])
    assert written == whole[: whole.index(stop)]


def test_settings_differ_from_prompt_to_prompt(model):
    prompts = [Prompt("a", {"max_gen_toks": n}) for n in (3, 9, 3)]
    written = Writer(model, "auto").texts(prompts)
    assert written == [greedy(model, "a", n) for n in (3, 9, 3)]


def test_drawn_texts_repeat_with_their_seed(model):
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10, "top_p": 0.95}
    prompts = [Prompt("a", settings, seed) for seed in (5, 6, 5)]
    first, second = (Writer(model, "auto").texts(prompts) for _ in range(2))
    assert first == second
    assert first[0] == first[2] != first[1]


def test_a_long_prompt_loses_its_beginning(model):
    writer = Writer(model, "auto")
    writer.texts([Prompt("x" * 200, {"max_gen_toks": 4})])
    assert writer.shortened == 1


def test_settings_that_are_not_done_are_refused(model):
    writer = Writer(model, "auto")
    with pytest.raises(UserError, match="'num_beams': 4.*--gen_kwargs num_beams=None"):
        writer.texts([Prompt("a", {"num_beams": 4})])
    with pytest.raises(UserError, match="write 256 tokens, and its context has 96.*toks=48"):
        writer.texts([Prompt("a", {})])
    writer.texts([Prompt("a", {"num_beams": 1, "max_gen_toks": 1, "top_k": 0, "x": "None"})])

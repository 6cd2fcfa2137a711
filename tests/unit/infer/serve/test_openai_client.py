"""What OpenAI's own client gets from the server."""

import openai
import pytest
import torch

from gristmill.infer.load import load

from .conftest import KEY, serving

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(chatty):
    with openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(path, ids, count):
    """The likeliest tokens after `ids` by forward passes without any cache."""
    loaded = load(path, "cpu", "32-true")
    out = list(ids)
    with torch.no_grad():
        for _ in range(count):
            out.append(int(loaded.model(torch.tensor([out]))[0, -1].argmax()))
    return loaded.tokenizer, out[len(ids) :]


def test_completion_is_the_models(client, chat_model):
    made = client.completions.create(model="tiny", prompt="the mill", temperature=0, max_tokens=9)
    loaded = load(chat_model, "cpu", "32-true")
    tokenizer, ids = greedy(chat_model, loaded.prompt_ids("the mill"), 9)
    assert made.choices[0].text == tokenizer.decode(ids)
    assert made.choices[0].finish_reason == "length"
    assert (made.object, made.model) == ("text_completion", "tiny")
    assert made.usage.prompt_tokens == len(loaded.prompt_ids("the mill"))
    assert made.usage.completion_tokens == 9
    assert made.usage.total_tokens == made.usage.prompt_tokens + 9


def test_streams_join_to_the_whole(client):
    ask = {"model": "tiny", "prompt": "the mill", "max_tokens": 30, "seed": 3}
    whole = client.completions.create(**ask)
    with client.completions.create(**ask, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_and_its_stream(client, chat_model):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**ask)
    text = "<|start|>user\nhello<|end|>\n<|start|>assistant\n"
    prompt = load(chat_model, "cpu", "32-true").tokenizer.encode(text, special=True)
    tokenizer, ids = greedy(chat_model, prompt, 12)
    if (end := tokenizer.encode("<|end|>", special=True)[0]) in ids:
        ids = ids[: ids.index(end)]
    assert whole.choices[0].message.content == tokenizer.decode(ids)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    options = {"include_usage": True}
    with client.chat.completions.create(**ask, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    shown = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(shown) == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_n_prompts_and_seeds(client):
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 1.5}
    made = client.completions.create(**ask, prompt=["a", "b"], n=2, seed=5)
    texts = [choice.text for choice in made.choices]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    again = client.completions.create(**ask, prompt="b", n=2, seed=5)
    assert [choice.text for choice in again.choices] == texts[2:]
    # Without a seed every request is another draw.
    free = {client.completions.create(**ask, prompt="b").choices[0].text for _ in range(4)}
    assert len(free) > 1


def test_prompts_of_ids_and_echo(client, chat_model):
    ids = load(chat_model, "cpu", "32-true").prompt_ids("the mill")
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    text = client.completions.create(**ask, prompt="the mill").choices[0].text
    assert client.completions.create(**ask, prompt=ids).choices[0].text == text
    assert client.completions.create(**ask, prompt=[ids, ids]).choices[1].text == text
    echoed = client.completions.create(**ask, prompt="the mill", echo=True)
    assert echoed.choices[0].text == "the mill" + text
    with client.completions.create(**ask, prompt="the mill", echo=True, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "the mill" + text


def test_stops_end_the_text_before_them(client):
    ask = {"model": "tiny", "prompt": "the mill", "temperature": 0, "max_tokens": 20}
    text = client.completions.create(**ask).choices[0].text
    stop = text[5:8]
    at = text.index(stop)
    cut = client.completions.create(**ask, stop=[stop, "not there"])
    assert cut.choices[0].text == text[:at]
    assert cut.choices[0].finish_reason == "stop"
    with client.completions.create(**ask, stop=stop, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text[:at]


def test_logprobs(client, chat_model):
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    made = client.completions.create(**ask, prompt="ab", logprobs=2).choices[0]
    loaded = load(chat_model, "cpu", "32-true")
    ids = loaded.prompt_ids("ab")
    with torch.no_grad():
        expected = loaded.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert made.logprobs.token_logprobs[0] == pytest.approx(float(expected.max()), abs=1e-4)
    assert len(made.logprobs.tokens) == 5
    assert made.logprobs.text_offset[0] == 0
    assert made.logprobs.token_logprobs[0] == max(made.logprobs.top_logprobs[0].values())
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    assert chat.logprobs.content
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        stream=True,
    )
    with stream:
        said = [c.choices[0].logprobs for c in stream]
    tokens = [token for part in said if part for token in part.content]
    assert [token.token for token in tokens] == [t.token for t in chat.logprobs.content]


def test_bias_and_penalties(client):
    ask = {"model": "tiny", "prompt": "ab", "temperature": 0, "max_tokens": 12}
    forced = client.completions.create(**ask, logit_bias={"70": 100}, logprobs=0).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    # A frequency penalty in the other direction than the bias wins after some tokens.
    less = client.completions.create(
        **ask, logit_bias={"70": 20}, frequency_penalty=2, presence_penalty=2, logprobs=0
    ).choices[0]
    assert len(set(less.logprobs.tokens)) > 1


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gristmill"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_key(base_model):
    with serving(base_model, key=KEY) as running:
        url = f"{running.url}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as right:
            assert right.completions.create(model="model", prompt="a").choices
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                right.chat.completions.create(model="model", messages=HELLO)
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as wrong,
            pytest.raises(openai.AuthenticationError, match="missing or wrong"),
        ):
            wrong.completions.create(model="model", prompt="a")

"""Every setting is honoured or refused in words."""

import json

import pytest

from gristmill.infer.serve import requests
from gristmill.infer.serve.fields import Refused
from gristmill.infer.serve.requests import Defaults, Limits, Reader, read_messages

HELLO = [{"role": "user", "content": "hi"}]
BIASES = {f"{i:0{width}}": 1 for width in range(3, 8) for i in range(260)}


def reader(*, has_chat=True, takes_system=True, **defaults):
    return Reader(
        model="tiny",
        limits=Limits(max_length=100, num_ids=260, max_replies=8),
        defaults=Defaults(**defaults),
        stop_ids=frozenset([1]),
        chat_stop_ids=frozenset([1, 2]),
        prompt_ids=lambda text: list(text.encode()),
        chat_ids=(lambda messages: list(str(messages).encode())) if has_chat else None,
        takes_system=takes_system,
        decode=lambda ids: bytes(ids).decode(),
    )


def completion(_defaults=None, **fields):
    body = json.dumps({"prompt": "ab", **fields}).encode()
    return reader(**(_defaults or {})).completion(body)


def chat(_defaults=None, **fields):
    body = json.dumps({"messages": HELLO, **fields}).encode()
    return reader(**(_defaults or {})).chat(body)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", 3, "prompt must be"),
        ("prompt", [], "prompt must be"),
        ("prompt", ["a", 3], "each prompt"),
        ("prompt", [[]], "each prompt"),
        ("prompt", [260], "0 to 259"),
        ("prompt", [[-1]], "0 to 259"),
        ("prompt", [True], "each prompt"),
        ("prompt", "", "the prompt is empty"),
        ("prompt", ["a"] * 9, "too many prompts"),
        ("n", 9, "too many replies"),
        ("n", 0, "1 or more"),
        ("n", 1.5, "whole number"),
        ("n", "2", "whole number (got a text)"),
        ("best_of", 3, "best_of must equal n"),
        ("max_tokens", 0, "1 or more"),
        ("prompt", "x" * 100, "at most 100 tokens here (100 of the prompt)"),
        ("max_tokens", 99, "at most 100 tokens here (2 of the prompt and 99 of the reply)"),
        ("max_tokens", 10**30, "whole number"),
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", "hot", "a number (got a text)"),
        ("temperature", True, "a number"),
        ("top_p", 1.1, "from 0 to 1"),
        ("top_k", -2, "-1 or more"),
        ("min_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "from 0.01"),
        ("presence_penalty", 3, "from -2 to 2"),
        ("frequency_penalty", -3, "from -2 to 2"),
        ("logit_bias", {"260": 1}, "0 to 259"),
        ("logit_bias", {"1": 101}, "-100 to 100"),
        ("logit_bias", {"x": 1}, "0 to 259"),
        ("logit_bias", {"²": 1}, "0 to 259"),
        ("logit_bias", [1], "must map"),
        ("logit_bias", {"7": 1, "07": 2}, "names a token id twice"),
        ("logit_bias", BIASES, "at most 1,024"),
        ("stop", 3, "stop must be"),
        ("stop", ["a", ""], "stop must be"),
        ("stop", ["a"] * 17, "at most 16"),
        ("stop", "x" * 1001, "1000"),
        ("seed", 2**63, "from"),
        ("seed", "x", "whole number"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", True, "whole number"),
        ("stream", 1, "true or false"),
        ("stream_options", {"include_usage": True}, "beside stream"),
        ("echo", "yes", "true or false"),
        ("suffix", "b", "suffix is not supported"),
        ("model", 3, "model must be a text"),
        ("service_tier", "priority", "not supported"),
        ("tools", [], "unknown setting (tools)"),
        ("guided_json", {}, "unknown setting (guided_json)"),
    ],
)
def test_what_is_wrong_with_a_completion(field, value, says):
    with pytest.raises(Refused) as refused:
        completion(**{field: value})
    assert says in refused.value.message
    assert (refused.value.param or field) in (field, "prompt")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": "hi"}, "messages must be"),
        ({"messages": HELLO * 101}, "fewer than there are messages (101)"),
        ({"messages": ["hi"]}, "messages[0] must be an object"),
        ({"messages": [{"content": "x"}]}, "the role of messages[0]"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "the role of messages[1]"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "the role of messages[0]"),
        ({"messages": [{"role": "user"}]}, "content of messages[0] must be a text"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of messages[0] must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a part that is no text (image_url)",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part that is no text"),
        ({"messages": [{**HELLO[0], "tool_calls": []}]}, "not supported: tool_calls"),
        ({"top_logprobs": 2}, "needs logprobs: true"),
        ({"logprobs": 3}, "true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "two names of one setting"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"modalities": ["audio"]}, "modalities is not supported"),
        ({"store": True}, "store is not supported"),
        ({"prompt": "x"}, "unknown setting (prompt)"),
        ({"stream": True, "stream_options": {"x": 1}}, "include_usage only"),
        ({"stream": True, "stream_options": 3}, "is an object"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "must be true or false"),
        ({"stream": True, "stream_options": {"include_usage": "no"}}, "must be true or false"),
        ({"messages": [{**HELLO[0], "name": 3}]}, "the name of messages[0] must be a text"),
    ],
)
def test_what_is_wrong_with_a_chat(fields, says):
    with pytest.raises(Refused) as refused:
        chat(**fields)
    assert says in refused.value.message


def test_what_changes_no_reply_is_taken():
    nothing = {
        "user": "me",
        "metadata": {"a": "b"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "store": False,
        "n": None,
        "stop": None,
        "service_tier": "auto",
        "stream": True,
        "stream_options": {"include_usage": False, "include_obfuscation": False},
    }
    assert not chat(**nothing).include_usage


def test_usage_is_told_when_asked_for():
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    assert chat(**asked).include_usage
    assert not chat(**{**asked, "stream_options": {"include_usage": None}}).include_usage


def test_a_model_without_template_has_no_chats():
    with pytest.raises(Refused, match="no chat template. use /v1/completions"):
        reader(has_chat=False).chat(json.dumps({"messages": HELLO}).encode())


def test_a_template_without_a_place_for_system_prompts():
    told = {"messages": [{"role": "developer", "content": "x"}, *HELLO]}
    assert reader().chat(json.dumps(told).encode()).asks
    with pytest.raises(Refused, match="no place for a system prompt"):
        reader(takes_system=False).chat(json.dumps(told).encode())


def test_log_probabilities_of_an_answer_are_bounded(monkeypatch):
    monkeypatch.setattr(requests, "MAX_LOGPROBS", 8 * 16 * 21)
    assert len(completion(n=8, logprobs=20).asks) == 8
    for fields in ({"n": 8, "max_tokens": 17}, {"prompt": ["a"] * 8, "max_tokens": 17}):
        with pytest.raises(
            Refused, match=r"\(136 tokens in all replies, 21 for each; at most 2,688"
        ):
            completion(**fields, logprobs=20)
        assert completion(**fields, logprobs=18).asks


def test_messages_as_templates_take_them():
    told = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "", "name": "Anna"},
    ]
    assert read_messages(told, 4) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "", "name": "Anna"},
    ]


def test_how_long_a_reply_may_be():
    assert completion().asks[0].max_new_tokens == 16
    assert completion(prompt="x" * 90).asks[0].max_new_tokens == 10
    assert completion(max_tokens=98).asks[0].max_new_tokens == 98
    assert completion({"max_new_tokens": 50}).asks[0].max_new_tokens == 50
    assert completion({"max_new_tokens": 50}, prompt="x" * 90).asks[0].max_new_tokens == 10
    free = chat().asks[0]
    assert free.max_new_tokens == 100 - len(free.ids)
    assert chat(max_tokens=7).asks[0].max_new_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).asks[0].max_new_tokens == 7
    assert chat({"max_new_tokens": 5}).asks[0].max_new_tokens == 5


def test_what_is_asked_is_what_is_told():
    asked = completion(
        prompt=[5, 6],
        temperature=0,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"3": 2},
        stop=["x", "y"],
        seed=-4,
        logprobs=0,
        ignore_eos=True,
    ).asks[0]
    assert asked.ids == [5, 6]
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0.0, 0.5, 4, 0.1)
    assert (asked.presence_penalty, asked.frequency_penalty) == (1.0, -1.0)
    assert (asked.repetition_penalty, asked.logit_bias) == (1.1, {3: 2.0})
    assert (asked.stops, asked.num_logprobs, asked.stop_ids) == (("x", "y"), 0, frozenset())
    assert 0 <= asked.seed < 2**63
    assert asked.goes_on
    assert not chat().asks[0].goes_on
    assert chat().asks[0].stop_ids == {1, 2}
    assert chat(logprobs=True, top_logprobs=2).asks[0].num_logprobs == 2
    assert chat(logprobs=True).asks[0].num_logprobs == 0


def test_defaults_of_the_server_and_of_nobody():
    given = {"temperature": 0.3, "top_k": 7, "top_p": 0.8}
    told = completion(given).asks[0]
    assert (told.temperature, told.top_k, told.top_p) == (0.3, 7, 0.8)
    own = completion(given, temperature=1, top_k=-1, top_p=1).asks[0]
    assert (own.temperature, own.top_k, own.top_p) == (1.0, None, 1.0)
    plain = completion().asks[0]
    assert (plain.temperature, plain.top_k, plain.top_p) == (1.0, None, 1.0)


def test_seeds_of_several_replies_follow_each_other():
    assert [asked.seed for asked in completion(n=3, seed=5).asks] == [5, 6, 7]
    assert completion(seed=2**63 - 1, n=2).asks[1].seed == 0
    assert completion().asks[0].seed != completion().asks[0].seed

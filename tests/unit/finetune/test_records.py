"""Records of all forms as conversations, and what is said of those that are none."""

from __future__ import annotations

import pytest

from gristmill.finetune.records import (
    BadRecord,
    conversation,
    read_conversations,
    with_inputs_inline,
)
from gristmill.util.errors import UserError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A", "text": "all of it"},
        {"instruction": "Q", "context": "", "response": "A", "category": "qa"},
        {"inputs": "Q", "targets": "A", "task": "t"},
        {"input": "Q", "output": "A", "source": "s", "subset": "s"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "Q", "answer": "A"},
        {"conversations": ["Q", "A"], "source": "s"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [USER, ANSWER], "prompt": "Q"},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
    ],
)
def test_every_form_means_the_same(record):
    assert conversation(record).messages == [USER, ANSWER]


def test_an_input_stays_apart_until_a_template_has_no_place_for_it():
    talk = conversation({"instruction": "Add", "input": "1 2", "output": "3"})
    assert talk.messages[0] == {"role": "user", "content": "Add", "input": "1 2"}
    assert with_inputs_inline(talk).messages[0] == {"role": "user", "content": "Add\n\n1 2"}


def test_a_system_prompt_and_tools_are_kept():
    for record in (
        {"system": "S", "instruction": "Q", "output": "A"},
        {"system": "S", "messages": [USER, ANSWER], "tools": [{"name": "f"}]},
    ):
        talk = conversation(record)
        assert talk.messages == [{"role": "system", "content": "S"}, USER, ANSWER]
        assert talk.tools == record.get("tools")


def test_null_means_that_a_field_is_not_there():
    # Parquet has every field of one message in all of them.
    fields = ("weight", "tool_calls", "name", "input", "from", "value")
    empty = dict.fromkeys(fields)
    record = {"messages": [empty | USER, empty | ANSWER], "system": None, "tools": None}
    talk = conversation(record)
    assert talk.messages == [USER, ANSWER]
    assert talk.tools is None
    empty = dict.fromkeys(("role", "content", "weight"))
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert conversation({"messages": [empty | turn for turn in turns]}).messages == [USER, ANSWER]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "value": None}]}
    assert conversation({"messages": [USER, call]}).messages[1] == {**call, "content": ""}


def test_only_the_first_turn_of_a_chat_if_asked():
    record = {"messages": [{"role": "system", "content": "S"}, USER, ANSWER, USER, ANSWER]}
    assert len(conversation(record).messages) == 5
    assert len(conversation(record, multiturn=False).messages) == 3


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (["Q", "A"], "a list, not an object"),
        ("Q", "text, not an object"),
        ({"text": "only text"}, "plain text, for `gristmill pretrain"),
        ({"title": "only a title"}, "no prompt .*only title"),
        ({"instruction": "Q"}, "no answer .*output.*only instruction"),
        ({"instruction": "Q", "output": None}, "no answer"),
        ({"instruction": "Q", "output": ""}, "its answer is empty"),
        ({"instruction": 5, "output": "A"}, "a text of it is 5"),
        ({"messages": "hello"}, "text, not a list of messages"),
        ({"messages": []}, "a list, not a list of messages|nothing|no messages"),
        ({"messages": [USER]}, "nobody answers"),
        ({"messages": [ANSWER, USER]}, "begins with an answer"),
        ({"messages": [{"content": "Q"}, ANSWER]}, "message 1 has no role"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "content of message 2 is 3"),
        ({"messages": [USER, 3]}, "message 2 is 3, not an object"),
    ],
)
def test_bad_records_say_what_is_wrong(record, says):
    with pytest.raises(BadRecord, match=says):
        conversation(record)


def test_bad_records_are_named_or_left_out():
    records = [{"instruction": "Q", "output": "A"}, *[{"instruction": "Q"}] * 5]
    with pytest.raises(
        UserError, match=r"f has records .*record 2: .*record 4.*and 2 more"
    ) as caught:
        read_conversations(records, "f")
    assert caught.value.fix == {"--data.on_error": "skip"}
    talks, skipped = read_conversations(records, "f", skip=True)
    assert (len(talks), skipped.count, len(skipped.reasons)) == (1, 5, 3)
    with pytest.raises(UserError, match="cannot be used") as caught:
        read_conversations(records[1:], "f", skip=True)
    assert not caught.value.fix

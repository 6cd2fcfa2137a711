import io
import json
import os
import sys
from pathlib import Path

import pytest

from gristmill.infer.prompts import DEFAULT, read_prompts
from gristmill.util.errors import UserError


def texts(path):
    return [prompt.text for prompt in read_prompts(None, str(path))]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def pipe(monkeypatch):
    """Puts bytes into a pipe that the command reads."""

    def put(content):
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reading))

    yield put
    sys.stdin.close()


def test_the_prompt_itself():
    assert read_prompts("# hi\n", None)[0].text == "# hi\n"
    assert read_prompts("", None)[0].text == ""


def test_without_any_it_is_the_default(monkeypatch):
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert read_prompts(None, None)[0].text == DEFAULT
    # Where there is no file behind it at all.
    monkeypatch.setattr(sys, "stdin", io.StringIO("not read"))
    assert read_prompts(None, None)[0].text == DEFAULT
    monkeypatch.setattr(sys, "stdin", None)
    assert read_prompts(None, None)[0].text == DEFAULT


def test_a_pipe_is_one_prompt(pipe):
    pipe("two\nlinesé\n".encode())
    assert [p.text for p in read_prompts(None, None)] == ["two\nlinesé"]


def test_a_file_in_place_of_the_input_is_one_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", write(tmp_path, "p", "a\nb\n\n").open())
    assert [p.text for p in read_prompts(None, None)] == ["a\nb\n"]


def test_an_empty_pipe_is_refused(pipe):
    pipe(b"\n")
    with pytest.raises(UserError, match="came through the pipe is empty"):
        read_prompts(None, None)


def test_lines(tmp_path):
    path = write(tmp_path, "p.txt", '\ufeffone\n\n  two \r\n{"prompt": 1}\n# three\u2028x')
    assert texts(path) == ["one", "  two ", '{"prompt": 1}', "# three\u2028x"]
    assert [p.place for p in read_prompts(None, str(path))][1] == f"line 3 of {path}"


def test_json_lines(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a\nb", "id": 7}, "plain", {"messages": chat}]
    path = write(tmp_path, "p.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second, third = read_prompts(None, str(path))
    assert (first.text, first.fields) == ("a\nb", {"prompt": "a\nb", "id": 7})
    assert second.fields == {"prompt": "plain"}
    assert third.messages == tuple(chat)
    listed = write(tmp_path, "p.json", json.dumps(lines))
    assert [p.text for p in read_prompts(None, str(listed))] == ["a\nb", "plain", ""]


def test_json_lines_from_the_input(pipe):
    pipe(b'\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert texts("-") == ["a", "b"]


def test_lines_from_the_input(pipe):
    pipe(b"[a]\nb\n")
    assert texts("-") == ["[a]", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "there is no prompt in"),
        ("p.txt", " \n\n", "there is no prompt in"),
        ("p.txt", b"ok\n\xff\xfe", r"is not UTF-8 \(byte 3\)"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 of .* is no JSON"),
        ("p.jsonl", '{"text": "a", "id": 1}', r"line 1 of .* has no prompt \(found: text, id\)"),
        ("p.jsonl", '{"prompt": "a", "messages": []}', "either `prompt` or `messages`"),
        ("p.jsonl", "{}", "found: nothing"),
        ("p.jsonl", "7", "found: int"),
        ("p.jsonl", '{"prompt": 7}', "is no text"),
        ("p.jsonl", '{"messages": []}', "are no conversation"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "are no conversation"),
        ("p.json", '{"prompt": "a"}', "holds no list"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read_prompts(None, str(path))


def test_bad_places(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        texts(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="Is a directory"):
        texts(tmp_path)
    with pytest.raises(UserError, match="both given"):
        read_prompts("a", "b")

import pytest

from gristmill.tokenizer.parity import awkward_texts
from gristmill.tokenizer.tokenizer import Tokenizer


def stream(tokenizer, ids):
    decoder = tokenizer.decoder()
    return [decoder.put(i) for i in ids], decoder.flush()


def test_parts_joined_are_the_whole_text(any_tokenizer):
    for text in awkward_texts(any_tokenizer.special_tokens):
        ids = any_tokenizer.encode(text[:2000])
        parts, rest = stream(any_tokenizer, ids)
        assert "".join(parts) + rest == any_tokenizer.decode(ids)


def test_no_part_holds_a_broken_character(any_tokenizer):
    text = "é 中文 🙂👩\u200d👧 שלום 한국어 ½"
    parts, rest = stream(any_tokenizer, any_tokenizer.encode(text))
    assert not any("\ufffd" in part for part in parts)
    assert rest == ""
    assert "".join(parts) == text


def test_words_come_as_soon_as_they_are_there(any_tokenizer):
    parts, _ = stream(any_tokenizer, any_tokenizer.encode("one two three four"))
    assert all(parts)


def test_special_tokens_between_words_keep_the_space(stories_dir):
    tokenizer = Tokenizer.load(stories_dir)
    ids = [1, *tokenizer.encode("Once upon"), 2, 1, *tokenizer.encode("a time")]
    parts, rest = stream(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids) == "Once upon a time"


def test_an_incomplete_character_comes_at_the_end(trained):
    ids = trained.encode("ab𒀀")
    parts, rest = stream(trained, ids[:-1])
    assert "".join(parts) == "ab"
    assert set(rest) == {"\ufffd"}


def test_broken_bytes_are_not_held_for_ever(trained):
    lone = trained.encode("𒀀")[1]  # a continuation byte
    parts, rest = stream(trained, [lone] * 40)
    assert len("".join(parts)) >= 30
    assert len("".join(parts) + rest) == 40


def test_flush_starts_anew(any_tokenizer):
    decoder = any_tokenizer.decoder()
    for _ in range(2):
        text = "".join(map(decoder.put, any_tokenizer.encode("a word"))) + decoder.flush()
        assert text == "a word"


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_shown_on_request(trained, skip):
    decoder = trained.decoder(skip_special=skip)
    shown = "".join(map(decoder.put, trained.encode("hi", bos=True, eos=True))) + decoder.flush()
    assert shown == ("hi" if skip else "<|bos|>hi<|endoftext|>")

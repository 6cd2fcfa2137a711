"""Options of generate and chat: texts stay as they are typed."""

import pytest

from gristmill.config.parse import parse
from gristmill.config.use_commands import Chat, Generate
from gristmill.util.errors import UserError


def generate(*words):
    return parse(Generate, words, prog="gristmill generate", positionals=("checkpoint_dir",))


AWKWARD = ["# Title", "\n", "\n\n", "  ", "~", "- x", "5", "{a: b}", "User:", "'x'", "1e5", "###"]


@pytest.mark.parametrize("text", AWKWARD)
def test_texts_are_what_was_typed(text):
    for option in ("prompt", "system", "stop"):
        for words in ([f"--{option}", text], [f"--{option}={text}"]):
            assert getattr(generate(*words), option) == text
    assert generate("--stop", text).stops == (text,)


def test_null_is_none_and_the_last_word_counts():
    assert generate("--stop", "null").stop is None
    assert generate("--stop", "###", "--stop", "null").stop is None
    assert generate("--system=# a", "--system", "b").system == "b"
    assert generate().stops == ()


def test_several_stops_are_a_list():
    assert generate("--stop", '["User:", "\\n\\n"]').stops == ("User:", "\n\n")
    assert generate("--stop", "[a, b]").stops == ("a", "b")


def test_options_as_litgpt_spells_them():
    words = ("--prompt", "a", "--num_samples", "2", "--top_k", "null", "--max_new_tokens", "9")
    cfg = generate("some/model", *words, "--top_p", "0.9", "--sys_prompt", "Be kind.")
    assert (cfg.checkpoint_dir, cfg.num_samples, cfg.top_k) == ("some/model", 2, None)
    assert (cfg.max_new_tokens, cfg.top_p, cfg.system) == (9, 0.9, "Be kind.")
    assert generate("--checkpoint_dir", "m") == generate("m") == generate("--checkpoint_path=m")
    chat = parse(Chat, ["m", "--multiline", "true"], prog="x", positionals=("checkpoint_dir",))
    assert (chat.checkpoint_dir, chat.multiline) == ("m", True)


def test_a_wrong_value_names_the_option():
    with pytest.raises(UserError, match=r"--batch_size many does not fit. It takes"):
        generate("--batch_size", "many")

import json

import pytest

from gristmill.tokenizer.sidecar import read_sidecar
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def bare(trained_dir, tmp_path):
    """A tokenizer.json alone: ids 0 <|bos|>, 1 <|endoftext|>, 2 <|user|>."""
    (tmp_path / "tokenizer.json").write_bytes((trained_dir / "tokenizer.json").read_bytes())
    return tmp_path


def ids(folder):
    tokenizer = Tokenizer.load(folder)
    return tokenizer.bos_id, tokenizer.eos_id


def test_alone_the_usual_name_counts(bare):
    assert ids(bare) == (None, 1)


def test_a_token_may_be_a_string_or_an_object(bare):
    eos = {"__type": "AddedToken", "content": "<|user|>", "lstrip": False}
    write(bare, tokenizer_config={"bos_token": "<|bos|>", "eos_token": eos})
    assert ids(bare) == (0, 2)


def test_special_tokens_map_counts_where_the_config_is_silent(bare):
    write(bare, tokenizer_config={"eos_token": "<|user|>"})
    write(bare, special_tokens_map={"eos_token": "<|bos|>", "bos_token": {"content": "<|bos|>"}})
    assert ids(bare) == (0, 2)


def test_generation_config_counts_last_and_may_name_several(bare):
    write(bare, generation_config={"bos_token_id": 0, "eos_token_id": [2, 1]})
    tokenizer = Tokenizer.load(bare)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 2, (2, 1))


def test_several_ids_of_the_model_itself_count_and_travel(bare, tmp_path):
    write(bare, config={"bos_token_id": 0, "eos_token_id": [2, 1]})
    Tokenizer.load(bare).save(tmp_path / "copy")
    for folder in (bare, tmp_path / "copy"):
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 2, (2, 1))


def test_one_id_of_the_model_does_not_end_texts_of_a_tokenizer_that_names_another(bare):
    write(bare, tokenizer_config={"eos_token": "<|endoftext|>"}, config={"eos_token_id": 2})
    assert Tokenizer.load(bare).stop_ids == (1,)


def test_an_explicit_null_means_none(bare):
    write(bare, tokenizer_config={"bos_token": None, "eos_token": "<|endoftext|>"})
    write(bare, generation_config={"bos_token_id": 2, "eos_token_id": 1})
    assert ids(bare) == (None, 1)


def test_ids_outside_the_vocabulary_are_not_taken(bare):
    write(bare, generation_config={"bos_token_id": 10**9, "eos_token_id": None})
    assert ids(bare) == (None, 1)


def test_a_name_without_a_token_is_none(bare):
    write(bare, tokenizer_config={"bos_token": "<|absent|>"})
    assert ids(bare)[0] is None


def test_add_bos_token_decides_before_the_post_processor(bare):
    write(bare, tokenizer_config={"bos_token": "<|bos|>"})
    assert Tokenizer.load(bare).adds_bos
    write(bare, tokenizer_config={"bos_token": "<|bos|>", "add_bos_token": False})
    assert not Tokenizer.load(bare).adds_bos


def test_chat_template_forms(tmp_path):
    assert read_sidecar(tmp_path).chat_template is None
    write(tmp_path, tokenizer_config={"chat_template": "one"})
    assert read_sidecar(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    assert read_sidecar(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert read_sidecar(tmp_path).chat_template == "three"


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_broken_file_is_named(bare, content):
    (bare / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer.load(bare)

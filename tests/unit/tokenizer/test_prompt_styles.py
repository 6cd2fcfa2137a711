"""What was trained in a prompt style of LitGPT's is asked in it."""

import pytest
import yaml

from gristmill.tokenizer import prompt_styles
from gristmill.tokenizer.chat import render
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

ASK = [{"role": "user", "content": "Why?"}]
TALK = [*ASK, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Oh?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def said(kind, messages, bos_token=None):
    template = prompt_styles.template(kind, bos_token=bos_token)
    named = {"bos_token": bos_token, "eos_token": "<eos>"}
    return render(template, messages, add_generation_prompt=True, **named)


@pytest.fixture
def checkpoint(trained_dir, tmp_path):
    """A directory with a tokenizer and a prompt style."""
    Tokenizer.load(trained_dir).save(tmp_path / "model")

    def named(kind):
        path = f"class_path: {kind}\n" if kind else "nothing: here\n"
        (tmp_path / "model/prompt_style.yaml").write_text(path)
        return tmp_path / "model"

    return named


def test_conversations_of_three_forms():
    assert said("Qwen3", [SYSTEM, *TALK]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nOh?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert said("CodeLlama", [SYSTEM, *TALK], "<s>") == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]So.<eos><s>[INST] Oh? [/INST]"
    )
    assert said("Alpaca", [SYSTEM, *TALK]) == (
        "Be brief.\n\n### Instruction:\nWhy?\n\n### Response:\nSo.<eos>"
        "\n\n### Instruction:\nOh?\n\n### Response:\n"
    )


def test_an_input_has_its_place():
    asked = [{**ASK[0], "input": "1 2"}]
    assert "Why?\n\n### Input:\n1 2\n\n### Response:\n" in said("Alpaca", asked)
    assert said("Alpaca", asked).startswith("Below is an instruction that describes a task, paired")
    assert said("Phi2", asked) == "Instruct: Why?\n\n1 2\nOutput:"


def test_bos_is_written_once():
    assert said("Llama3", ASK, "<|begin_of_text|>").count("<|begin_of_text|>") == 1
    assert said("Llama3", ASK, "<s>").startswith("<s><|begin_of_text|><|start_header_id|>")
    assert said("Default", ASK, "<s>") == "<s>Why?"


@pytest.mark.parametrize("messages", [[SYSTEM, *ASK], [*ASK, SYSTEM], [{"role": "tool"}]])
def test_what_has_no_place_is_refused(messages):
    with pytest.raises(UserError, match="no place for a"):
        said("Phi2", messages)


@pytest.mark.parametrize("kind", prompt_styles.names().values())
def test_every_style_is_a_template_that_is_found_again(kind):
    for bos_token in (None, "<s>"):
        template = prompt_styles.template(kind, bos_token=bos_token)
        found = prompt_styles.kind_of(template, "<s>")
        assert prompt_styles.template(found, bos_token=bos_token) == template
    assert "So." in said(kind, TALK)
    assert said(kind, TALK).count("Oh?") == 1
    assert prompt_styles.kind_of("{{ messages }}", "<s>") is None


def test_a_checkpoints_style_is_its_tokenizers_template(checkpoint, tmp_path):
    tokenizer = Tokenizer.load(checkpoint("litgpt.prompts.Alpaca"))
    assert tokenizer.prompt_style == "Alpaca"
    assert "### Response:" in tokenizer.chat_template
    # Others get it as a template, which then counts.
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy/chat_template.jinja").read_text() == tokenizer.chat_template
    (tmp_path / "copy/prompt_style.yaml").write_text("class_path: litgpt.prompts.Phi2\n")
    copy = Tokenizer.load(tmp_path / "copy")
    assert (copy.prompt_style, copy.chat_template) == (None, tokenizer.chat_template)


def test_styles_that_are_not_known(checkpoint):
    tokenizer = Tokenizer.load(checkpoint("my.own.Style"))
    assert (tokenizer.prompt_style, tokenizer.chat_template) == ("my.own.Style", None)
    with pytest.raises(UserError, match=r"prompt_style.yaml cannot be read. write `class_path"):
        Tokenizer.load(checkpoint(None))


def test_the_file_says_nothing_that_is_not_read():
    words = {"name", "begin", "system", "default", "default_with_input", "inside", "user", "input"}
    words |= {"reply", "end", "between"}
    path = prompt_styles.__file__.removesuffix("py") + "yaml"
    with open(path, encoding="utf-8") as file:
        styles = yaml.safe_load(file)
    for kind, style in styles.items():
        assert set(style) <= words, kind
        assert style["user"].count("{}") == 1, kind
    assert len({style["name"] for style in styles.values()}) == len(styles)

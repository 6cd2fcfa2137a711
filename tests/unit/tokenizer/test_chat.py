import shutil

import pytest

from gristmill.tokenizer.chat import encode_chat, render
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi & <hello> ü"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' -%}
        [INST] {{ m.content | trim }} [/INST]
    {%- elif m.role == 'assistant' %}
        {% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
OTHERS = """{% set ns = namespace(first=true) %}
{% for m in messages %}
  {% if m.role == "system" %}{% continue %}{% endif %}
{{ m | tojson }} {{ loop.index }}{{ tools is none }}{{ undefined_name }}
  {% set ns.first = false %}
  {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ messages | tojson(indent=1) }} {{ ns.first }}"""


def our_text(template, **options):
    settings = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    return render(template, TALK, **(settings | options))


def test_known_forms():
    assert our_text(CHATML).endswith("user\nBye<|im_end|>\n<|im_start|>assistant\n")
    assert our_text(LLAMA2).startswith("<s>[INST] Hi & <hello> ü [/INST]")
    assert "Hello!</s>" in our_text(LLAMA2)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, OTHERS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_is_that_of_transformers(template, add_generation_prompt):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = chat.render_jinja_template(
        [TALK],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert our_text(template, add_generation_prompt=add_generation_prompt) == theirs[0]


def test_a_token_that_is_not_there_prints_nothing():
    assert our_text("[{{ bos_token }}]", bos_token=None) == "[]"


def test_strftime_now():
    assert our_text("{{ strftime_now('%Y') }}").startswith("20")


def test_further_variables():
    assert our_text("{{ enable_thinking }}", enable_thinking=False) == "False"


def test_the_templates_own_objection_is_told():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refuses this conversation.*roles must alternate"):
        our_text(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
        "{{ messages | nofilter }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_reaches_out(template):
    with pytest.raises(UserError, match=r"chat template fails.*chat_template\.jinja"):
        our_text(template)


def test_control_tokens_in_messages_stay_text(trained_dir, tmp_path):
    tokenizer = with_template(trained_dir, tmp_path, "<|user|>{{ messages[0].content }}<|bos|>")
    control = tokenizer.encode("<|user|><|bos|>", special=True)
    assert len(control) == 2
    for text in (
        "no marks",
        "a <|bos|> b",
        "<|bos|><|user|>",
        "<|bo",
        "\ufdd0<|bos|>",
        "<|<|bos|>",
    ):
        ids = encode(tokenizer, text)
        # The template's own two are control tokens, those of the message are not.
        assert [ids[0], ids[-1]] == control
        assert not set(control) & set(ids[1:-1])
        assert tokenizer.decode(ids[1:-1]) == text
        assert ids[1:-1] == tokenizer.encode(text)


def test_messages_without_control_tokens_are_encoded_in_one_go(trained_dir, tmp_path):
    tokenizer = with_template(trained_dir, tmp_path, "Q:{{ messages[0].content }}")
    # A token over the border of template and message, as everybody's encoding has it.
    assert encode(tokenizer, "  x") == tokenizer.encode("Q:  x")
    nested = [{"role": "user", "content": [{"type": "text", "text": "<|bos|>"}]}]
    ids = encode_chat(tokenizer, nested, add_generation_prompt=True)
    assert not set(ids) & set(tokenizer.encode("<|bos|>", special=True))


def test_a_template_that_trims_or_repeats_keeps_control_tokens_text(trained_dir, tmp_path):
    template = "{{ messages[0].content | trim }}|{{ messages[0].content[:3] }}"
    tokenizer = with_template(trained_dir, tmp_path, template)
    ids = encode(tokenizer, " <|bos|> ")
    assert not set(ids) & set(tokenizer.encode("<|bos|>", special=True))
    assert "<|bos|>|" in tokenizer.decode(ids)


def test_no_template_is_said(trained):
    with pytest.raises(UserError, match="has no chat template"):
        encode(trained, "hi")


def with_template(trained_dir, folder, template):
    shutil.copytree(trained_dir, folder / "tok")
    (folder / "tok" / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder / "tok")


def encode(tokenizer, content):
    messages = [{"role": "user", "content": content}]
    return encode_chat(tokenizer, messages, add_generation_prompt=True)

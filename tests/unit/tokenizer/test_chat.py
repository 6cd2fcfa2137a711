import pytest

from gristmill.tokenizer.chat import render
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

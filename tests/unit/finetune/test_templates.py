"""Which tokens carry loss under the chat templates of known models, down to the step's targets."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from gristmill.finetune.examples import encode
from gristmill.finetune.records import Conversation
from gristmill.finetune.samples import RecordSamples
from gristmill.models.loss import IGNORE
from gristmill.tokenizer import prompt_styles
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.train.batch import TokenBatch

from .conftest import CHATML, write_tokenizer

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)


class Case(NamedTuple):
    """A template, its control tokens, and what is learned of a talk with two answers."""

    template: str
    controls: tuple[str, ...]
    learned: str
    prompts: str
    """What the model is given before the first answer, without a system message."""


CASES = {
    "chatml": Case(
        CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "1<|im_end|>\n2<|im_end|>\n",
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen-2.5": Case(
        "{%- if messages[0]['role'] == 'system' %}"
        "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
        "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system'"
        " and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
        "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "1<|im_end|>\n2<|im_end|>\n",
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama-3": Case(
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "1<|eot_id|>2<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama-2": Case(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and "
        "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
        "'\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("</s>",),
        " 1 </s> 2 </s>",
        "<s>[INST] One? [/INST]",
    ),
    "mistral": Case(
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + ""
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}",
        ("</s>",),
        "1</s>2</s>",
        "<s>[INST] One? [/INST]",
    ),
    "gemma": Case(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}" + ALTERNATE + ""
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "1<end_of_turn>\n2<end_of_turn>\n",
        "<s><start_of_turn>user\nOne?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi-3": Case(
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "1<|end|>\n2<|end|>\n<|endoftext|>",
        "<|user|>\nOne?<|end|>\n<|assistant|>\n",
    ),
    "zephyr": Case(  # TinyLlama's chat model too
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}",
        ("</s>",),
        "1</s>\n2</s>\n",
        "<|user|>\nOne?</s>\n<|assistant|>\n",
    ),
    "alpaca": Case(
        prompt_styles.template("Alpaca", bos_token=None),
        ("</s>",),
        "1</s>2</s>",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nOne?\n\n### Response:\n",
    ),
}
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def tokenizer(case, tmp_path) -> Tokenizer:
    end = "</s>" if "</s>" in case.controls else case.controls[-1]
    names = ("<s>", *case.controls)
    folder = write_tokenizer(tmp_path, case.template, names=names, bos_token="<s>", eos_token=end)
    return Tokenizer.load(folder)


def targets(talks, tokenizer):
    """The inputs of a step with these records, and what each of them must foresee."""
    examples = encode([Conversation(talk) for talk in talks], tokenizer, mask_prompt=True)
    samples = RecordSamples(examples, 2 * max(examples.lengths), seed=0, packing=True)
    rows = samples.batch(0, len(talks))
    batch = TokenBatch.of(rows, torch.device("cpu"), document_mask=True)
    (micro,) = batch.micro_batches(len(rows.tokens))
    return micro


def text(tokenizer, ids):
    return tokenizer.decode(ids.tolist(), skip_special=False)


def test_every_answer_and_its_end_carry_loss_and_nothing_else(case, tokenizer):
    micro = targets([TALK], tokenizer)
    wanted = micro.targets != IGNORE
    assert text(tokenizer, micro.targets[wanted]) == case.learned
    assert torch.equal(micro.targets[:, :-1][wanted[:, :-1]], micro.inputs[:, 1:][wanted[:, :-1]])
    first = int(wanted[0].nonzero()[0])  # the input that the first answer is foreseen from
    assert text(tokenizer, micro.inputs[0, : first + 1]) == case.prompts


def test_two_records_of_a_row_carry_what_each_does_alone(case, tokenizer):
    micro = targets([TALK, TALK], tokenizer)
    assert len(micro.inputs) == 1
    assert text(tokenizer, micro.targets[micro.targets != IGNORE]) == 2 * case.learned


def test_only_answers_with_a_weight_carry_loss(case, tokenizer):
    weightless = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    micro = targets([weightless], tokenizer)
    learned = case.learned[case.learned.index("2") - case.learned.startswith(" ") :]
    assert text(tokenizer, micro.targets[micro.targets != IGNORE]) == learned


def test_a_trailing_question_carries_no_loss(case, tokenizer):
    micro = targets([TALK[:3]], tokenizer)
    learned = text(tokenizer, micro.targets[micro.targets != IGNORE])
    assert learned == case.learned[: case.learned.index("2") - case.learned.startswith(" ")]

"""Questions in LitGPT's prompt styles are the same texts here as there.

LitGPT 0.5.13 lives in an environment of its own: GRISTMILL_LITGPT_PYTHON names its interpreter.
"""

from __future__ import annotations

import json

import peers

from gristmill.tokenizer import prompt_styles
from gristmill.tokenizer.chat import render
from gristmill.util.errors import UserError

ASKED, SYSTEM, ABOUT = "What food do llamas eat?", "Be brief.\n", "Grass, hay."
SAY = """
import inspect, json, sys
from litgpt import prompts
asked, system, about = sys.argv[1:]
said = {}
for name, kind in vars(prompts).items():
    if inspect.isclass(kind) and issubclass(kind, prompts.PromptStyle):
        if kind is not prompts.PromptStyle:
            style = kind()
            said[name] = [style.apply(asked), style.apply(asked, sys_prompt=system)]
            said[name].append(style.apply(asked, input=about))
short = {name: kind.__name__ for name, kind in prompts.prompt_styles.items()}
print(json.dumps([said, short]))
"""


def ours(kind: str, *messages: dict[str, str]) -> str | None:
    """The text of the messages; None where the style has no place for one."""
    template = prompt_styles.template(kind, bos_token=None)
    try:
        return render(
            template, messages, add_generation_prompt=True, bos_token=None, eos_token="</s>"
        )
    except UserError:
        return None


def test_every_style_asks_as_theirs_does(tmp_path):
    peer = peers.peer("GRISTMILL_LITGPT_PYTHON", "import litgpt")
    printed = peer(tmp_path, SAY, ASKED, SYSTEM, ABOUT)
    said, short = json.loads(printed.splitlines()[-1])
    assert len(said) > 30
    asked = {"role": "user", "content": ASKED}
    for kind, (plain, with_system, with_input) in said.items():
        assert ours(kind, asked) == plain, kind
        told = ours(kind, {"role": "system", "content": SYSTEM.rstrip()}, asked)
        # Theirs leave it out where there is no place, and glue Alpaca's to what follows.
        if with_system != plain:
            assert told is not None, kind
            assert told.replace("\n", "") == with_system.replace("\n", ""), kind
        if kind == "Alpaca":
            assert ours(kind, {**asked, "input": ABOUT}) == with_input
    names = prompt_styles.names()
    assert {name: names[name] for name in short} == short

"""Chat templates of models whose files have none, from what their makers say of their prompts."""

from __future__ import annotations

_ROLES = (
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{user}"
    "{{% elif message['role'] == 'assistant' %}}{{{{ ' ' + message['content'] + '\\n' }}}}"
    "{{% else %}}{{{{ message['content'] + '\\n' }}}}{{% endif %}}{{% endfor %}}"
)

TEMPLATES = {
    # https://huggingface.co/microsoft/phi-2, "QA Format"
    "phi-2": _ROLES.format(user="{{ 'Instruct: ' + message['content'] + '\\nOutput:' }}"),
    # https://huggingface.co/microsoft/phi-1_5, "QA Format"
    "phi-1_5": _ROLES.format(user="{{ message['content'] + '\\n\\nAnswer:' }}"),
}


def chat_template(name: str) -> str | None:
    """The template of the model whose directory has this name; None for one that has none."""
    return TEMPLATES.get(name.lower())

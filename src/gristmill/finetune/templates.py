"""How a prompt becomes text: styles as chat templates, so that whoever loads the model has them."""

from __future__ import annotations

from pathlib import Path

from gristmill.tokenizer import prompt_styles
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

OWN = "chat"
"""The style that is the model's own chat template."""


def choose_template(style: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """(name, template) of the style that was asked for.

    A model that was made for texts that begin with BOS gets one. Raises UserError for a style that
    does not exist, or a chat template that the model lacks.
    """
    own = tokenizer.chat_template
    if style == "auto":
        style = OWN if own is not None else "alpaca"
    if style == OWN:
        if own is None:
            raise UserError(
                "--data.prompt_style chat: the model has no chat template. Use alpaca, give a "
                "Jinja template, or put a chat_template.jinja into the model's directory.",
                {"--data.prompt_style": "alpaca"},
            )
        return OWN, own
    known = prompt_styles.names()
    if style in known:
        bos_token = tokenizer.bos_token if tokenizer.adds_bos else None
        return style, prompt_styles.template(known[style], bos_token=bos_token)
    if "{{" in style or "{%" in style:
        return "a template of yours", style
    path = Path(style).expanduser()
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        try:
            return path.name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data.prompt_style {style} cannot be read ({error}).") from None
    raise UserError(
        f"--data.prompt_style {style} is not known. Use auto, {OWN} (the model's own chat "
        f"template), {', '.join(known)}, or a Jinja chat template (text, or a .jinja file).",
        {"--data.prompt_style": "auto"},
    )

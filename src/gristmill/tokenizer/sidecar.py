"""What the files beside a tokenizer say: its BOS and EOS, its chat template, added tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.tokenizer.prompt_styles import read_style
from gristmill.util.errors import UserError

TEMPLATE = "chat_template.jinja"
# Copied with a tokenizer wherever it goes, the first two being definitions.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
    "vocab.json",
    "merges.txt",
)
GENERATION = "generation_config.json"
DEFINITION = "gristmill_definition"
"""In tokenizer_config.json: which file defines the tokenizer, where another one was made of it."""


@dataclass(frozen=True)
class AddedToken:
    """A token that the files beside a SentencePiece model add to it."""

    content: str
    id: int
    special: bool


@dataclass(frozen=True)
class Sidecar:
    """What the files beside a tokenizer say; every field may be unknown.

    `bos` and `eos` are a token's text or its id. A `…_known` is true when a file speaks of the
    token at all: an explicit null means that there is none.
    """

    bos: str | int | None = None
    eos: str | int | None = None
    bos_known: bool = False
    eos_known: bool = False
    stop_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    chat_template: str | None = None
    prompt_style: str | None = None
    """The class of LitGPT's prompt style that the model was trained in."""
    added: tuple[AddedToken, ...] = field(default=())


def read_sidecar(folder: Path) -> Sidecar:
    """What the files in `folder` say about the tokenizer there. Raises UserError for bad JSON."""
    config = read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / GENERATION)
    model = read_json(folder / "config.json")
    # In this order: the tokenizer's own words, then the ids that the model's files carry.
    by_name = (config, read_json(folder / "special_tokens_map.json"))
    by_id = (generation, model)
    bos_known, bos = _first(by_name, by_id, "bos")
    eos_known, eos = _first(by_name, by_id, "eos")
    add_bos = config.get("add_bos_token")
    # One id alone may be what an architecture has by default.
    several = _ids(model.get("eos_token_id"))
    return Sidecar(
        bos=bos,
        eos=eos,
        bos_known=bos_known,
        eos_known=eos_known,
        stop_ids=_ids(generation.get("eos_token_id")) or (several if len(several) > 1 else ()),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=_chat_template(folder, config),
        # Whoever writes a template beside it wants that one.
        prompt_style=None if (folder / TEMPLATE).is_file() else read_style(folder),
        added=tuple(_added(folder, config)),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file at `path`, empty when there is no file. UserError for others."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}). repair the file or download the tokenizer again."
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a {type(value).__name__}, not an object. "
            "repair the file or download the tokenizer again."
        )
    return value


def _first(
    by_name: tuple[dict[str, Any], ...], by_id: tuple[dict[str, Any], ...], role: str
) -> tuple[bool, str | int | None]:
    """Whether a file speaks of the token, and its text or id."""
    for source in by_name:
        if f"{role}_token" in source:
            token = source[f"{role}_token"]
            content = token.get("content") if isinstance(token, dict) else token
            return True, content if isinstance(content, str) and content else None
    for source in by_id:
        ids = _ids(source.get(f"{role}_token_id"))
        if ids:
            return True, ids[0]
    return False, None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: transformers' older form
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _added(folder: Path, config: dict[str, Any]) -> Iterator[AddedToken]:
    """Tokens added to the model, each once; one without flags counts as special."""
    seen: set[str] = set()
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and str(key).isdigit() and token.get("content"):
            seen.add(token["content"])
            yield AddedToken(token["content"], int(key), bool(token.get("special", True)))
    for content, token_id in read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, int) and content not in seen:
            yield AddedToken(content, token_id, special=True)

"""A SentencePiece model as a `tokenizer.json`, for readers that would read the model otherwise."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from gristmill.tokenizer.huggingface import HuggingFaceBackend
from gristmill.tokenizer.parity import awkward_texts, difference
from gristmill.tokenizer.sentencepiece_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
    read_model,
)
from gristmill.tokenizer.tokenizer import Tokenizer

_SPACE = "▁"


def tokenizer_json(tokenizer: Tokenizer, *, adds_bos: bool) -> str | None:
    """The content of a `tokenizer.json` that cuts texts as the `tokenizer.model` does.

    `adds_bos`: whether it puts BOS before a text where somebody asks for special tokens.
    Compared on awkward texts and on pieces of the model next to each other. None for models that
    have no such form: unigram models, those that change characters or join spaces, tokens that
    are set by hand or added beside the model, and where a comparison found a difference.
    """
    if tokenizer.kind != "sentencepiece":
        return None
    model = read_model(tokenizer.path.read_bytes())
    texts = [piece.text for piece in model.pieces]
    if (
        model.model_type != BPE
        or model.character_map
        or model.remove_extra_spaces
        or len(set(texts)) < len(texts)
        or tokenizer.num_token_ids != len(texts)
        or any(piece.type in (USER_DEFINED, UNUSED) for piece in model.pieces)
    ):
        return None
    content = json.dumps(_definition(model, tokenizer, adds_bos), ensure_ascii=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        other = HuggingFaceBackend(path)
    probes = [*awkward_texts(tokenizer.special_tokens), *_neighbours(model)]
    return None if difference(tokenizer, other, probes) else content


def _definition(model: Model, tokenizer: Tokenizer, adds_bos: bool) -> dict[str, Any]:
    """https://github.com/huggingface/tokenizers: the parts that a text goes through."""
    named = [(i, p.text) for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    before: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_space_prefix:
        before.insert(0, {"type": "Prepend", "prepend": _SPACE})
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags, "special": True} for i, t in named],
        "normalizer": {"type": "Sequence", "normalizers": before},
        "pre_tokenizer": None,
        "post_processor": _begins_with_bos(tokenizer) if adds_bos else None,
        "decoder": {"type": "Sequence", "decoders": after},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((p.text for p in model.pieces if p.type == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _merges(model: Model) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, the one with the highest score first."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    found = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-model.pieces[i].score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _begins_with_bos(tokenizer: Tokenizer) -> dict[str, Any] | None:
    if tokenizer.bos_token is None:
        return None
    token = tokenizer.bos_token
    bos = [{"SpecialToken": {"id": token, "type_id": part}} for part in (0, 1)]
    text = [{"Sequence": {"id": name, "type_id": part}} for part, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [bos[0], text[0]],
        "pair": [bos[0], text[0], bos[1], text[1]],
        "special_tokens": {token: {"id": token, "ids": [tokenizer.bos_id], "tokens": [token]}},
    }


def _neighbours(model: Model) -> list[str]:
    """Texts of pieces in the order of the model and in another one, some at a time."""
    texts = [p.text.replace(_SPACE, " ") for p in model.pieces if p.type == NORMAL]
    mixed = sorted(texts, key=lambda text: text[::-1])
    return ["".join(some[i : i + 16]) for some in (texts, mixed) for i in range(0, len(some), 16)]

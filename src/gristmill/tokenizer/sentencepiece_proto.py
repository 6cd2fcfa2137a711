"""The protocol buffer of a SentencePiece model, read and written without its library.

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces."""

# Fields of a model, of its trainer_spec and of its normalizer_spec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_ROLE_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_ROLE_PIECES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
_NAME, _CHARACTER_MAP, _ADD_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Piece:
    """A token of a model: its text, its score (higher is merged first), its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a SentencePiece model says of how a text is cut."""

    pieces: tuple[Piece, ...]
    model_type: int = BPE
    add_space_prefix: bool = True
    remove_extra_spaces: bool = False
    character_map: bytes = b""
    """Compiled rules that change characters beforehand; empty for none."""


def read_model(data: bytes) -> Model:
    """The model in the bytes of a `tokenizer.model`."""
    pieces, add_prefix, remove_spaces, character_map = [], 1, 1, b""
    for number, value in fields(data):
        if number == _PIECES and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == _NORMALIZER and isinstance(value, bytes):
            found = dict(fields(value))
            add_prefix = _int(found.get(_ADD_PREFIX, 1))
            remove_spaces = _int(found.get(_REMOVE_SPACES, 1))
            rules = found.get(_CHARACTER_MAP, b"")
            character_map = rules if isinstance(rules, bytes) else b""
    return Model(
        pieces=tuple(pieces),
        model_type=model_type(data),
        add_space_prefix=bool(add_prefix),
        remove_extra_spaces=bool(remove_spaces),
        character_map=character_map,
    )


def write_model(model: Model, roles: dict[str, int]) -> bytes:
    """The bytes of a `tokenizer.model`. roles: unk, bos, eos, pad -> id, those that there are."""
    out = b""
    for piece in model.pieces:
        body = _text(1, piece.text) + _tag(2, 5) + struct.pack("<f", piece.score)
        out += _chunk(_PIECES, body + _number(3, piece.type))
    has_bytes = any(piece.type == BYTE for piece in model.pieces)
    trainer = _number(_MODEL_TYPE, model.model_type)
    trainer += _number(_VOCAB_SIZE, len(model.pieces)) + _number(_BYTE_FALLBACK, has_bytes)
    for role, field in _ROLE_IDS.items():
        trainer += _number(field, roles.get(role, -1))
        if role in roles:
            trainer += _text(_ROLE_PIECES[role], model.pieces[roles[role]].text)
    rules = _text(_NAME, "identity") + _chunk(_CHARACTER_MAP, model.character_map)
    rules += _number(_ADD_PREFIX, model.add_space_prefix)
    rules += _number(_REMOVE_SPACES, model.remove_extra_spaces) + _number(_ESCAPE_SPACES, 1)
    return out + _chunk(_TRAINER, trainer) + _chunk(_NORMALIZER, rules)


def model_type(model: bytes) -> int:
    """The kind of a model: trainer_spec.model_type."""
    for number, value in fields(model):
        if number == _TRAINER and isinstance(value, bytes):
            return next(
                (v for n, v in fields(value) if n == _MODEL_TYPE and isinstance(v, int)), UNIGRAM
            )
    return UNIGRAM


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer message: number, and value or contents."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield tag >> 3, message[at : at + length]
        at += length


def _piece(data: bytes) -> Piece:
    found = dict(fields(data))
    text, score = found.get(1, b""), found.get(2, b"\0\0\0\0")
    assert isinstance(text, bytes)
    assert isinstance(score, bytes)
    return Piece(text.decode(), struct.unpack("<f", score)[0], _int(found.get(3, NORMAL)))


def _int(value: int | bytes) -> int:
    assert isinstance(value, int)
    return value


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(int(value))


def _chunk(field: int, data: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _chunk(field, text.encode())

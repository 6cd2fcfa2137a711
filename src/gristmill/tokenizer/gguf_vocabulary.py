"""Tokenizers in the metadata of GGUF files: out into files that we read, and in for llama.cpp.

What the words mean: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's
`src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.tokenizer import sentencepiece_proto as proto
from gristmill.tokenizer.gguf_splits import KINDS, name_of, pre_tokenizer
from gristmill.tokenizer.sidecar import read_sidecar
from gristmill.util.errors import UserError
from gristmill.util.gguf_header import AGAIN, Header, read_header
from gristmill.util.paths import user_cache_dir

if TYPE_CHECKING:
    from gristmill.tokenizer.tokenizer import Tokenizer

_VERSION = 1  # of the conversion: part of the name of what it wrote
_BYTES, _PIECES = "gpt2", "llama"  # the format's words for byte-level BPE and SentencePiece
_OTHER = (
    "Put the tokenizer.json of the model beside the file, or name another (--tokenizer_dir DIR)."
)
_PADDING = "[PAD"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def unpack(path: Path) -> Path:
    """The `tokenizer.json` or `tokenizer.model` that the GGUF file at `path` means.

    It is made in the user's cache, once for each vocabulary, with the files that belong beside it.
    One of an unknown kind may lie beside the GGUF file; without raises UserError.
    """
    header = read_header(path)
    try:
        return _unpacked(path, header)
    except UserError:
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path.parent / name).is_file():
                return path.parent / name
        raise


def _unpacked(path: Path, header: Header) -> Path:
    """The file in the cache."""
    name = f"{header.digest[:32]}-{_VERSION}"
    for root in (user_cache_dir(), Path(tempfile.gettempdir()) / f"gristmill-{os.getuid()}"):
        folder = root / "gguf-tokenizers" / name
        try:
            if not folder.is_dir():
                _make(folder, path, header.metadata)
        except OSError:
            continue  # a read-only home: the next place
        return next(folder.glob("tokenizer.[jm]*"))
    raise UserError(
        f"the tokenizer of {path} could not be written to the cache. "
        "Set XDG_CACHE_HOME to a directory that you may write."
    )


def num_tokens(metadata: Mapping[str, Any]) -> int | None:
    """The largest id with a token + 1, without rows that only fill up; None without a tokenizer."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return None if tokens is None else len(_real(metadata))


def stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, EOS first."""
    ends = [metadata.get(f"tokenizer.ggml.{word}_token_id") for word in ("eos", "eot")]
    return tuple(dict.fromkeys(i for i in ends if i is not None))


def describe(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer, filled up to `vocab_size` tokens.

    Raises UserError when llama.cpp would cut text otherwise than this tokenizer does.
    """
    if tokenizer.num_token_ids > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.num_token_ids} ids, the model {vocab_size} rows. "
            "Use the tokenizer that the model was trained with."
        )
    words = _describe_pieces(tokenizer) or _describe_bytes(tokenizer)
    tokens: list[str] = words["tokenizer.ggml.tokens"]
    missing = range(len(tokens), vocab_size)
    tokens += [f"{_PADDING}{number}]" for number in missing]
    words["tokenizer.ggml.token_type"] += [proto.UNUSED for _ in missing]
    if "tokenizer.ggml.scores" in words:
        words["tokenizer.ggml.scores"] += [0.0 for _ in missing]
    words["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    words["tokenizer.ggml.add_eos_token"] = False
    for role, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token_id is not None:
            words[f"tokenizer.ggml.{role}_token_id"] = token_id
    others = [token_id for token_id in tokenizer.stop_ids if token_id != tokenizer.eos_id]
    if others:
        words["tokenizer.ggml.eot_token_id"] = others[0]
    if tokenizer.chat_template:
        words["tokenizer.chat_template"] = tokenizer.chat_template
    return words


def _make(folder: Path, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the files beside `folder` and move them there."""
    try:
        name, content = _definition(path, metadata)
        texts = _beside(metadata)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError) as error:  # metadata of another sort than expected
        raise UserError(f"the tokenizer in {path} is damaged ({error!r}). {AGAIN}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        (partial / name).write_bytes(content)
        for other, text in texts.items():
            (partial / other).write_text(text, encoding="utf-8")
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _definition(path: Path, metadata: Mapping[str, Any]) -> tuple[str, bytes]:
    """Name and content of the file that defines the tokenizer."""
    kind = metadata.get("tokenizer.ggml.model")
    whole = metadata.get("tokenizer.huggingface.json")
    if isinstance(whole, str):
        return "tokenizer.json", whole.encode()
    if kind == _PIECES:
        return "tokenizer.model", _pieces_model(metadata)
    if kind in (None, "none", "no_vocab"):
        raise UserError(f"no tokenizer at {path} (there is none in it). {_OTHER}")
    if kind != _BYTES:
        raise UserError(f"{path} has a tokenizer of the kind {kind!r}, not supported. {_OTHER}")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in KINDS:
        raise UserError(
            f"{path} parts text by the rules {pre!r}, which are not known. {_OTHER} "
            f"Known: {', '.join(KINDS)}."
        )
    made = json.dumps(_bytes_json(metadata, pre), ensure_ascii=False, indent=1)
    return "tokenizer.json", made.encode("utf-8", "surrogateescape")


def _real(metadata: Mapping[str, Any]) -> list[str]:
    """The tokens, without unused ones at the end that fill up the rows."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = _types(metadata)
    end = len(tokens)
    while end and types[end - 1] == proto.UNUSED and tokens[end - 1].startswith(_PADDING):
        end -= 1
    return tokens[:end]


def _types(metadata: Mapping[str, Any]) -> list[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [proto.NORMAL] * len(tokens)
    return types


def _bytes_json(metadata: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """A `tokenizer.json` of byte-level BPE."""
    tokens, types = _real(metadata), _types(metadata)
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[token_id] == proto.CONTROL,
        }
        for token_id, token in enumerate(tokens)
        if types[token_id] in (proto.CONTROL, proto.USER_DEFINED)
    ]
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    starts = metadata.get("tokenizer.ggml.add_bos_token", KINDS[pre].adds_bos) and bos is not None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if KINDS[pre].nfc else None,
        "pre_tokenizer": pre_tokenizer(KINDS[pre]),
        "post_processor": _begin_with(tokens[bos], bos) if starts else None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": KINDS[pre].ignore_merges,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [m.split(" ", 1) for m in metadata.get("tokenizer.ggml.merges", [])],
        },
    }


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    """The `post_processor` that puts a token before every text."""

    def parts(*letters: tuple[str, int]) -> list[dict[str, Any]]:
        first: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}
        texts = [{"Sequence": {"id": letter, "type_id": number}} for letter, number in letters]
        return [first, *texts]

    return {
        "type": "TemplateProcessing",
        "single": parts(("A", 0)),
        "pair": parts(("A", 0)) + parts(("B", 1)),
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _pieces_model(metadata: Mapping[str, Any]) -> bytes:
    """A `tokenizer.model` of SentencePiece."""
    tokens, types = _real(metadata), list(_types(metadata))
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    ids = {r: metadata.get(f"tokenizer.ggml.{word}_token_id") for r, word in _ROLES.items()}
    roles = {role: i for role, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    unknown = [token_id for token_id, kind in enumerate(types) if kind == proto.UNKNOWN]
    roles["unk"] = unknown[0] if unknown else roles.get("unk", 0)
    types[roles["unk"]] = proto.UNKNOWN  # a model has exactly one
    pieces = [proto.Piece(*piece) for piece in zip(tokens, scores, types)]
    rules = metadata.get("tokenizer.ggml.precompiled_charsmap") or []
    model = proto.Model(
        pieces=tuple(pieces),
        add_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
        remove_extra_spaces=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        character_map=bytes(value & 0xFF for value in rules),
    )
    return proto.write_model(model, roles)


def _beside(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The files beside the definition: special tokens, chat template, ids that end a text."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    adds_bos = kind == _PIECES or (pre in KINDS and KINDS[pre].adds_bos)
    is_pieces = kind == _PIECES and "tokenizer.huggingface.json" not in metadata
    config: dict[str, Any] = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if is_pieces:
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    for role, word in _ROLES.items():
        token_id = metadata.get(f"tokenizer.ggml.{word}_token_id")
        known = token_id is not None and 0 <= token_id < len(tokens)
        config[f"{role}_token"] = tokens[token_id] if known else None
    texts = {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n"}
    if stops := stop_ids(metadata):
        texts["generation_config.json"] = json.dumps({"eos_token_id": stops}) + "\n"
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        texts["chat_template.jinja"] = template
    return texts


def _describe_pieces(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Metadata of a SentencePiece model, also one beside a `tokenizer.json`; None for others."""
    path = tokenizer.path
    if tokenizer.kind == "tokenizers":
        if _is_bytes(_load(path)) or not (path.parent / "tokenizer.model").is_file():
            return None
        path = path.parent / "tokenizer.model"
    model = proto.read_model(path.read_bytes())
    if model.model_type != proto.BPE or model.character_map or model.remove_extra_spaces:
        raise UserError(
            f"{path} is no SentencePiece model that llama.cpp reads exactly (one of BPE that "
            "changes no characters and keeps all spaces). Export to Hugging Face instead "
            "(--format hf)."
        )
    pieces = list(model.pieces)
    added = sorted(read_sidecar(path.parent).added, key=lambda token: token.id)
    for token in added:
        if token.id >= len(pieces):
            gap = range(len(pieces), token.id)
            pieces += [proto.Piece(f"{_PADDING}{i}]", 0.0, proto.UNUSED) for i in gap]
            kind = proto.CONTROL if token.special else proto.USER_DEFINED
            pieces.append(proto.Piece(token.content, -1000.0, kind))
    unknown = [i for i, piece in enumerate(pieces) if piece.type == proto.UNKNOWN]
    return {
        "tokenizer.ggml.model": _PIECES,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.unknown_token_id": unknown[0] if unknown else 0,
        "tokenizer.ggml.add_space_prefix": model.add_space_prefix,
    }


def _describe_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    """Metadata of a byte-level BPE tokenizer."""
    raw = _load(tokenizer.path)
    pre = name_of(raw) if _is_bytes(raw) else None
    if pre is None:
        raise UserError(
            f"llama.cpp has no word for how {tokenizer.path} parts a text, and would part it "
            f"otherwise. It has some for: {', '.join(KINDS)}. Export to Hugging Face instead "
            "(--format hf), or train with a tokenizer of `gristmill tokenizer train`."
        )
    ids: dict[int, tuple[str, int]] = {
        token_id: (token, proto.NORMAL) for token, token_id in raw["model"]["vocab"].items()
    }
    for token in raw.get("added_tokens", []):
        kind = proto.CONTROL if token["special"] else proto.USER_DEFINED
        ids[token["id"]] = (token["content"], kind)
    rows = [ids.get(i, (f"{_PADDING}{i}]", proto.UNUSED)) for i in range(max(ids) + 1)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    return {
        "tokenizer.ggml.model": _BYTES,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, kind in rows],
        "tokenizer.ggml.merges": merges,
        # The file itself, for those who can read it: llama.cpp's words leave out its finer points.
        "tokenizer.huggingface.json": tokenizer.path.read_text(encoding="utf-8"),
    }


def _load(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return raw


def _is_bytes(raw: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is byte-level BPE."""
    decoder = raw.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return raw["model"].get("type") == "BPE" and any(s.get("type") == "ByteLevel" for s in steps)

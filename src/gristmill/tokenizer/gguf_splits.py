"""How llama.cpp parts a text before merging, for each word of `tokenizer.ggml.pre`.

The patterns are those of the `tokenizer.json` that a word stands for. llama.cpp has them in
`src/llama-vocab.cpp`, some in another notation for the same splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# GPT-2's, the `use_regex` of the ByteLevel pre-tokenizer. What its last part matches, is left over
# without it and a piece of its own all the same.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = _WORDS + r"|\s+"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_ONE_DIGIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp does with a file that says nothing of its splits.
_UNKNOWN = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
_PUNCTUATION = (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Kind:
    """A row: patterns that part a text one after the other, and two more rules."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    """A whole word that is a token is that token, whatever the merges say."""
    nfc: bool = False
    """Characters are composed (Unicode NFC) beforehand. llama.cpp itself never does."""
    adds_bos: bool = False
    """Where the file does not say whether a text begins with BOS."""


KINDS: dict[str, Kind] = {
    "gpt-2": Kind((WORDS,)),
    "phi-2": Kind((WORDS,)),
    "mpt": Kind((WORDS,)),
    "olmo": Kind((WORDS,)),
    "jais": Kind((WORDS,)),
    "smollm": Kind((DIGIT, WORDS)),
    "starcoder": Kind((DIGIT, WORDS)),
    "refact": Kind((DIGIT, WORDS)),
    "codeshell": Kind((DIGIT, WORDS)),
    "llama-bpe": Kind((_THREE_DIGITS,), ignore_merges=True, adds_bos=True),
    "llama3": Kind((_THREE_DIGITS,), ignore_merges=True, adds_bos=True),
    "llama-v3": Kind((_THREE_DIGITS,), ignore_merges=True, adds_bos=True),
    "falcon3": Kind((_THREE_DIGITS,), ignore_merges=True, adds_bos=True),
    "smaug-bpe": Kind((_THREE_DIGITS,)),
    "dbrx": Kind((_THREE_DIGITS,)),
    "qwen2": Kind((_ONE_DIGIT,), nfc=True),
    "deepseek-r1-qwen": Kind((_ONE_DIGIT,)),
    "tekken": Kind((_CASED,), ignore_merges=True, adds_bos=True),
    "falcon": Kind(_PUNCTUATION),
    "default": Kind(_UNKNOWN),
}
"""`tokenizer.ggml.pre` -> rules; of several words for the same rules the first is written."""


def pre_tokenizer(kind: Kind) -> dict[str, Any]:
    """The `pre_tokenizer` of a `tokenizer.json`."""
    steps: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in kind.splits
    ]
    steps.append(_bytes(use_regex=False))
    return {"type": "Sequence", "pretokenizers": steps}


def name_of(tokenizer: dict[str, Any]) -> str | None:
    """The word for the splits of a `tokenizer.json`, None when llama.cpp has none for them."""
    splits = _splits(tokenizer.get("pre_tokenizer"))
    nfc = _is_nfc(tokenizer.get("normalizer"))
    if splits is None or nfc is None:
        return None
    merges = bool(tokenizer["model"].get("ignore_merges"))
    fits = [n for n, k in KINDS.items() if k.splits == splits and k.ignore_merges == merges]
    # llama.cpp composes no characters for any of its words.
    return next((name for name in fits if KINDS[name].nfc == nfc), fits[0] if fits else None)


def _splits(step: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The patterns of a pre-tokenizer that ends in bytes; None for one of another sort."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    out: list[str] = []
    for number, part in enumerate(steps):
        is_last = number == len(steps) - 1
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
                if part.get("invert") or is_last:
                    return None
                out.append(pattern)
            case {"type": "Digits", "individual_digits": True} if not is_last:
                out.append(DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if not is_last:
                    return None
                out += [WORDS] if part.get("use_regex", True) else []
            case _:
                return None
    return tuple(out)


def _is_nfc(step: dict[str, Any] | None) -> bool | None:
    """Whether a normalizer composes characters; None for one that does something else."""
    steps = step["normalizers"] if step and step["type"] == "Sequence" else [step] if step else []
    kinds = [part["type"] for part in steps]
    return None if set(kinds) - {"NFC"} else bool(kinds)


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }

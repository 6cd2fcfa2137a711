"""Keys that the environment holds, taken out of texts that people and files get to see."""

from __future__ import annotations

import os
import re
from typing import Any

WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "CREDENTIALS")
"""A variable of the environment with a part that ends so (HF_TOKEN) holds a key."""

SHORTEST = 8
"""Values of fewer characters are words such as `true`, not keys."""

_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redact(text: str) -> str:
    """The text with `***` for the environment's keys and for names and passwords in addresses."""
    keys = {
        value for name, value in os.environ.items() if len(value) >= SHORTEST and _names_a_key(name)
    }
    # The longest first: a key may be the beginning of another.
    for key in sorted(keys, key=len, reverse=True):
        text = text.replace(key, "***")
    return _IN_URL.sub("***", text)


def redacted(value: Any) -> Any:
    """The same plain value with each text in it as `redact` leaves it."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return value


def _names_a_key(variable: str) -> bool:
    """Not TOKENIZER_DIR or MAX_TOKENS, whose values are in settings as they are."""
    return any(part.endswith(WORDS) for part in re.split(r"[^A-Z0-9]+", variable.upper()))

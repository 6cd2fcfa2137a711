"""Keys that the environment holds, taken out of texts that people and files get to see."""

from __future__ import annotations

import os
import re

WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
"""A variable of the environment that has one of these in its name holds a key."""

SHORTEST = 8
"""Values of fewer characters are words such as `true`, not keys."""

_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redact(text: str) -> str:
    """The text with `***` for the environment's keys and for names and passwords in addresses."""
    keys = {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and any(word in name.upper() for word in WORDS)
    }
    # The longest first: a key may be the beginning of another.
    for key in sorted(keys, key=len, reverse=True):
        text = text.replace(key, "***")
    return _IN_URL.sub("***", text)

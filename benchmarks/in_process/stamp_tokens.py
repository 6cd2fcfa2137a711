"""What every side of `finetune.py` calls between two steps, or two parts of one.

Appends `seconds tokens` to the file that STAMPS names: the clock, and how many tokens of records,
padding not counted, were trained on until then. `stamp` is for `gristmill finetune … --hook`.
"""

import os
import time


def note(tokens: int) -> None:
    """Note the time and how many tokens were trained on."""
    with open(os.environ["STAMPS"], "a", encoding="ascii") as file:
        file.write(f"{time.perf_counter()!r} {tokens}\n")


def stamp(run: object, stats: object) -> None:
    """Note the end of a step of ours."""
    note(run.state.tokens)  # type: ignore[attr-defined]

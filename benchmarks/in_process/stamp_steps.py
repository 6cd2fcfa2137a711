"""A hook for `gristmill pretrain --hook stamp_steps:stamp`: notes when every step has ended."""

import os
import time


def stamp(run: object, stats: object) -> None:
    """Append the time of now to the file that STAMPS names."""
    with open(os.environ["STAMPS"], "a", encoding="ascii") as file:
        file.write(f"{time.perf_counter()!r}\n")

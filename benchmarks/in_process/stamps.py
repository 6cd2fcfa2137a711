"""What every side of `train_step.py` calls between two steps; needs torch alone.

Appends `before after probe` to the file that STAMPS names: the clock when a step has ended and when
the next may begin, and how long one product of matrices took between them, in seconds.
"""

import os
import time

import torch

SIZE = 2048
_matrices: list[torch.Tensor] = []


def stamp() -> None:
    """Note the end of a step, time a bf16 product of 2048 x 2048 matrices, note the time again."""
    before = time.perf_counter()
    if not _matrices:
        _matrices.extend(torch.ones(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(3))
    left, right, out = _matrices
    started = time.perf_counter()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.mm(left, right, out=out)
    probe = time.perf_counter() - started
    with open(os.environ["STAMPS"], "a", encoding="ascii") as file:
        file.write(f"{before!r} {time.perf_counter()!r} {probe!r}\n")

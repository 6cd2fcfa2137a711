"""The one ordered list of what is done to a freshly built decoder before training."""

from __future__ import annotations

import torch
from torch import nn

from gristmill.parallel.compile import compile_blocks, missing_for_compile


def parallelize(model: nn.Module, device: torch.device, *, compile: str) -> str:
    """Make `model` ready for this device, in place; returns a word on what was done.

    Order matters: later items see what earlier ones made.
    """
    if compile == "off":
        return "eager"
    missing = missing_for_compile(device)
    if missing is not None:
        return f"eager ({missing})"
    compile_blocks(model)
    return "compiled blocks"

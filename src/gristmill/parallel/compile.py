"""Compile each block of a decoder, where this machine has what the compiler needs."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from gristmill.util.paths import user_cache_dir

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def missing_for_compile(device: torch.device) -> str | None:
    """What the compiler lacks on this machine, in words; None when it can run."""
    if device.type == "mps":
        return "torch.compile is not ready for MPS"
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler is on the PATH (install g++)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return "Python.h is missing (install the python development package)"
    return None


def keep_what_is_compiled() -> None:
    """Have the compiler keep its work in the user's cache directory, for the next run.

    torch's own place is the system's folder for temporary files, which is emptied between runs of
    a container or a batch job. Where `TORCHINDUCTOR_CACHE_DIR` is set, or the user has no place to
    write to, nothing changes.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing parts of torch sets the variable to its default.
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) != default_cache_dir():
        return
    folder = user_cache_dir() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[CACHE_VARIABLE] = str(folder)


def compile_blocks(
    model: nn.Module, device: torch.device | None = None, *, sharded: bool = False
) -> None:
    """Compile every block in place; parameter names stay as they are.

    Blocks share their code, so the first one is compiled and the others reuse it. The head and its
    loss stay outside the graph, where chunks bound their memory; the softmax is compiled by itself.
    """
    options = None
    weight = next(model.parameters())
    device = weight.device if device is None else device
    if device.type == "cpu" and (sharded or weight.dtype == torch.bfloat16):
        # Without this, two biases that meet in a parallel residual are a C++ compile error when
        # their gradients are bf16 (torch 2.13), as those of sharded weights may be.
        options = {"cpp.max_horizontal_fusion_size": 1}
    keep_what_is_compiled()
    for block in model.layers:
        block.compile(dynamic=False, options=options)
    model.compiled = True

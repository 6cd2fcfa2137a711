"""Which device, which arithmetic, how fast it can be and how much memory it holds."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch

from gristmill.util.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>

PROBE_S = 0.2
"""How long the matrix-product probe of `peak_flops` runs, once it is warm."""


class Memory(NamedTuple):
    """Bytes held by this process: resident memory on a CPU, allocated tensors on a GPU."""

    current: int
    peak: int


def choose_device(name: str = "auto") -> torch.device:
    """The device to work on: `auto` is the local CUDA device, then MPS, then the CPU.

    `cuda:1` is the second one. Raises UserError when the named device is not on this machine.
    """
    name, colon, number = name.partition(":")
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if name not in has or (colon and not (name == "cuda" and number.isdecimal())):
        given = f"{name}{colon}{number}"
        raise UserError(f"unknown device ({given}). choose one of: auto, cpu, cuda, mps, cuda:1.")
    if not has[name]:
        there = ", ".join(kind for kind, present in has.items() if present)
        raise UserError(
            f"torch finds no {name} device here (torch {torch.__version__}, available: {there}). "
            f"use --device auto, or install the torch build for this device."
        )
    if colon and int(number) >= torch.cuda.device_count():
        raise UserError(
            f"there is no cuda:{number} here (of {torch.cuda.device_count()}, counted from 0). "
            "choose another."
        )
    if colon:
        return torch.device("cuda", int(number))
    if name == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.device("cuda", index)
    return torch.device(name)


def num_devices(asked: int | str, kind: str = "auto") -> int:
    """Processes on this machine: one for each device asked for; `auto`: all GPUs, or one.

    Raises UserError for more than there are; a CPU takes any number.
    """
    if isinstance(asked, int) and asked < 1:
        raise UserError(f"--devices {asked}: give 1 or more.", {"--devices": 1})
    kind = choose_device(kind).type
    if kind == "cpu":
        return asked if isinstance(asked, int) else 1
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if not isinstance(asked, int):
        return there
    if asked > there:
        raise UserError(
            f"--devices {asked}: this machine has {there}. Use at most that.",
            {"--devices": there},
        )
    return asked


def bf16_supported(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware (emulated bf16 is slower than fp32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    # `mkldnn._is_mkldnn_bf16_supported` is also true on AVX-512 without bf16 instructions.
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


def resolve_precision(name: str, device: torch.device, *, bf16: str = "bf16-mixed") -> str:
    """The precision that a name stands for: `auto` is `bf16` where the device has it, else 32-true.

    Training leaves `bf16` at bf16-mixed; inference passes bf16-true. A typed name is honoured.
    """
    if name == "auto":
        return bf16 if bf16_supported(device) else "32-true"
    if name not in ("bf16-mixed", "bf16-true", "32-true"):
        raise UserError(
            f"unknown precision ({name}). choose one of: auto, bf16-mixed, bf16-true, 32-true."
        )
    return name


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype that parameters are held in under a resolved precision."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that matrix products are computed in under a resolved precision."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What products are computed in under a resolved precision, if not in the weights' dtype."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


def autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """Inside, matrix products are computed in `dtype`; None: in that of their weights."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def describe(device: torch.device, precision: str) -> str:
    """One line for people: device, arithmetic and the backend that computes it."""
    return f"{_device_name(device)}, {precision}, {_backend(device, precision)}"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The best FLOP/s of a short matrix product here and now; None when it cannot be measured.

    Takes about 0.3 s with the present number of threads. It is what this machine gives to one
    large product, not a data-sheet figure, so an MFU against it says how much is left to gain.
    """
    size = 1024 if device.type == "cpu" else 8192 if device.type == "cuda" else 2048
    try:
        a, b = (
            torch.ones(size, size, dtype=compute_dtype(precision), device=device) for _ in range(2)
        )
        start = time.perf_counter()
        _timed_product(a, b, device)
        best = _timed_product(a, b, device)
        # A machine so slow that two products used the budget has its answer already.
        while time.perf_counter() - start < PROBE_S:
            best = min(best, _timed_product(a, b, device))
    except RuntimeError:
        return None
    return 2 * size**3 / best


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no limit is the word "max"
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what one training step on a CPU frees, for the next one to use.

    glibc gives each large buffer back to the system and takes a fresh one, page by page, a moment
    later: 8 % of the time of a step of pythia-14m, 17 % of pythia-160m (measured on a virtual
    machine, where pages are dear). The peak grows by some per cent. Other C libraries and devices
    are left alone.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def memory_bytes(device: torch.device) -> Memory:
    """Memory of this process now and at its peak, in bytes (see `Memory`)."""
    if device.type == "cuda":
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    peak = _peak_resident_bytes()
    if device.type == "mps":
        current = torch.mps.current_allocated_memory()
        return Memory(current, max(current, peak))
    return Memory(_resident_bytes() or peak, peak)


def _timed_product(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return max(time.perf_counter() - start, 1e-9)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "unknown"
    threads = torch.get_num_threads()
    return f"cpu ({str(name).strip()}, {threads} thread{'s' if threads > 1 else ''})"


def _backend(device: torch.device, precision: str) -> str:
    if device.type == "cuda":
        return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if device.type == "mps":
        return "Metal"
    has = torch.cpu.get_capabilities()
    library = "oneDNN" if torch.backends.mkldnn.is_available() else "native"
    if precision == "32-true":
        return f"{library} {torch.backends.cpu.get_cpu_capability()}"
    for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if has.get(flag, False):
            return f"{library} {label}"
    return f"{library} bf16" if bf16_supported(device) else f"{library}, emulated bf16 (slow)"


def _resident_bytes() -> int | None:
    return _status_bytes("VmRSS")


def _peak_resident_bytes() -> int:
    # Linux hands `ru_maxrss` down from the parent process through exec; VmHWM starts afresh.
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _status_bytes(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None

"""What decoding computes on a CPU, as fast as memory gives the weights.

A step multiplies one row for each sequence with every matrix of the model. torch's product reads
bf16 at half of the memory's bandwidth then, and its operations take longer to call than to do. The
kernels in `native/` are built when they are first asked for (some seconds), kept in the user's
cache directory, and used for bf16 on processors with AMX; everywhere else torch's are.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.util.paths import user_cache_dir

MOST_ROWS = 16
"""More rows than this are a matrix product, which torch is better at."""
NOT_FOR_THESE = "they are for bf16 on a CPU"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared")
FLAGS += ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma")
FLAGS += ("-mamx-tile", "-mamx-bf16")


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` in bf16 whose products of few rows go through the kernel; for inference."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] times the matrix, [..., out]."""
        return linear(x, self.weight, self.bias)


class OnePassNorm(nn.RMSNorm):
    """An `nn.RMSNorm` in bf16 that reads its rows once, by the kernel; for inference."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x [..., size], same shape and dtype."""
        if not _is_for_kernels(x) or x.shape[-1] % 16 or self.weight is None:
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        rows = _rows(x)
        return torch.ops.gristmill.rms_norm(rows, self.weight, eps).view(x.shape)


class Int8Linear(nn.Module):
    """A linear layer whose matrix is int8, each row with a scale of its own; for inference.

    `weight` int8 [out, in], `scale` [out]; what is computed is (x weight^T) * scale + bias.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] times the matrix, [..., out]."""
        if _fits(x, self.weight):
            return _product(x, self.weight, self.scale, self.bias)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def use_kernels(model: nn.Module, tell: Callable[[str], None] | None = None) -> str | None:
    """Have a decoder in bf16 on a CPU use them; None, or why not. Parameters stay as they are.

    `tell` gets a line when they have to be built first.
    """
    weights = {p.dtype for p in model.parameters()}
    devices = {p.device.type for p in model.parameters()}
    if devices != {"cpu"} or torch.bfloat16 not in weights:
        return NOT_FOR_THESE
    if reason := build(tell):
        return reason
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = FewRowsLinear
        elif type(module) is nn.RMSNorm and module.weight.dtype == torch.bfloat16:
            module.__class__ = OnePassNorm
    model.linear = linear
    return None


def is_plain(config: ModelConfig) -> bool:
    """Whether `block` computes the blocks without experts of such a model."""
    width = config.num_heads * config.head_size
    return (
        (config.norm, config.norm_weight, config.norm_unit_offset) == ("rmsnorm", True, False)
        and config.pre_norm
        and not config.post_norm
        and not config.parallel_residual
        and (config.mlp, config.activation) == ("gated", "silu")
        and config.qk_norm == "none"
        and config.qkv_clip is None
        and config.latent_attention is None
        and config.adaption_prompt is None
        and all(n % 32 == 0 for n in (config.hidden_size, config.intermediate_size, width))
        and config.kv_heads * config.head_size >= 32
    )


def block(
    x: Tensor,
    norms: Sequence[nn.Module],
    layers: Sequence[nn.Module],
    tables: tuple[Tensor, Tensor] | None,
    cache: Sequence[Tensor],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor | None:
    """The residual stream x [n, 1, d] after a plain block, in one call; None where it has others.

    `norms` are those before attention and feed-forward, `layers` are q, k, v, o, gate, up and
    down; the rest is as in `attend_rows`.
    """
    first, second = norms
    known = all(type(layer) in (FewRowsLinear, Int8Linear) for layer in layers)
    if not known or type(first) is not OnePassNorm or not _is_small(x):
        return None
    eps = torch.finfo(x.dtype).eps if first.eps is None else first.eps
    y = torch.ops.gristmill.block(
        _rows(x),
        first.weight,
        second.weight,
        eps,
        *((None, None) if tables is None else tables),
        *cache,
        window or 0,
        scale,
        softcap or 0.0,
        *_operands(layers),
    )
    return y.unsqueeze(1)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of three layers makes of x, in one call where all have the kernel."""
    if _all_fit(x, layers):
        rows = _rows(x)
        out = torch.ops.gristmill.few_rows_3(rows, *_operands(layers))
        return tuple(y.view(*x.shape[:-1], -1) for y in out)
    return tuple(layer(x) for layer in layers)


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """silu(gate(x)) * up(x), in one call where both have the kernel."""
    if _all_fit(x, (gate, up)):
        rows = _rows(x)
        y = torch.ops.gristmill.few_rows_gated(rows, *_operands((gate, up)))
        return y.view(*x.shape[:-1], -1)
    a, b = gate(x), up(x)
    if _is_for_kernels(a, b) and a.shape[-1] % 32 == 0:
        return torch.ops.gristmill.silu_times(a.contiguous(), b.contiguous())
    return F.silu(a) * b


def _all_fit(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    return all(
        isinstance(layer, (FewRowsLinear, Int8Linear)) and _fits(x, layer.weight)
        for layer in layers
    )


def _operands(layers: Sequence[nn.Module]) -> list[Tensor | None]:
    """Matrices, scales and biases, as the kernels take them."""
    scales = [layer.scale if type(layer) is Int8Linear else None for layer in layers]
    return [*(layer.weight for layer in layers), *scales, *(layer.bias for layer in layers)]


def can_attend(config: ModelConfig, tensors: Sequence[Tensor]) -> bool:
    """Whether `attend_rows` is for caches of these tensors."""
    return (
        is_built()
        and config.latent_attention is None
        # What its vectors add is made of rotated queries, which stay inside of the kernel.
        and config.adaption_prompt is None
        and config.head_size % 32 == 0
        and config.head_size <= 1024
        and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
    )


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    cache: Sequence[Tensor],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """What the new token of each row gathers from itself and those before it, [n, 1, heads, D].

    q [n, 1, heads, D], k and v [n, 1, kv_heads, D] as they come from the projections; `tables` are
    cosine and sine [n, 1, 1, turned / 2] or None. `cache` is keys and values [B, kv_heads, room, D]
    of all sequences, and int64 [n] which of them the rows are and where their new keys, turned, and
    values are written; `window` and `softcap` as in `Attention`.
    """
    q, k, v = (part.to(torch.bfloat16).flatten(0, 1).contiguous() for part in (q, k, v))
    cos, sin = (None, None) if tables is None else (t.contiguous() for t in tables)
    out = torch.ops.gristmill.attend_rows(
        q, k, v, cos, sin, *cache, window or 0, scale, softcap or 0.0
    )
    return out.unsqueeze(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradients, through the kernel where it is built and x has few rows."""
    if _fits(x, weight):
        return _product(x, weight, None, bias)
    return F.linear(x, weight, bias)


def can_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    cache: Sequence[Tensor],
    start: int,
) -> bool:
    """Whether `keep` is for these, and the cache has room for them."""
    # Angles that all rows share. What is compiled would copy the whole cache around the kernel.
    return (
        tables[0].dim() == 3
        and not torch.compiler.is_compiling()
        and len(q) == len(cache[0])
        and start + q.shape[1] <= cache[0].shape[2]
        and _is_for_kernels(q, k, v, *cache)
    )


def keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    cache: Sequence[Tensor],
    start: int,
) -> Tensor:
    """q [B, T, heads, D] turned, as [B, heads, T, D]; the rest goes to where it is kept.

    k, turned, and v [B, T, kv_heads, D] are written to `cache`, keys and values
    [B, kv_heads, room, D], from position `start` on; `tables` are cosine and sine
    [T, 1, turned / 2].
    """
    parts = (part.contiguous() for part in (q, k, v, *tables))
    return torch.ops.gristmill.keep(*parts, *cache, start)


def _rows(x: Tensor) -> Tensor:
    """x [..., size] as [rows, size] without gaps: a reshaped part of something wider has them."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _is_small(x: Tensor) -> bool:
    return 0 < math.prod(x.shape[:-1]) <= MOST_ROWS and _is_for_kernels(x)


def _is_for_kernels(*parts: Tensor) -> bool:
    return (
        is_built()
        and not torch.is_grad_enabled()
        and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in parts)
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        _is_small(x)
        and weight.dtype in (torch.bfloat16, torch.int8)
        and weight.is_contiguous()
        and weight.shape[1] % 32 == 0
        and weight.shape[0] >= 32
    )


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    rows = _rows(x)
    y = torch.ops.gristmill.few_rows(rows, weight, scale, bias)
    return y.view(*x.shape[:-1], -1)


_state: dict[str, str | None] = {}


def is_built() -> bool:
    """Whether this process has the kernels."""
    return _state.get("reason", "not asked for") is None


def build(tell: Callable[[str], None] | None = None) -> str | None:
    """Build the kernels or load them from the cache; None, or why this process goes without."""
    if "reason" not in _state:
        try:
            torch.ops.load_library(_library(tell))
            torch.library.register_fake("gristmill::few_rows", _fake)
            torch.library.register_fake("gristmill::few_rows_3", _fake_3)
            torch.library.register_fake("gristmill::few_rows_gated", _fake)
            for name in ("rms_norm", "silu_times", "block", "attend_rows"):
                torch.library.register_fake(f"gristmill::{name}", _fake_like)
            _state["reason"] = None
        except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
            _state["reason"] = _reason(error)
    return _state["reason"]


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    said = [line for line in lines if "error" in line] + lines + [type(error).__name__]
    return said[0].strip()


def _fake(x: Tensor, w: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _fake_like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _fake_3(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[0], w.shape[0]) for w in others[:3] if w is not None)


def _library(tell: Callable[[str], None] | None) -> Path:
    """The shared library, built unless it is in the cache."""
    has = torch.cpu.get_capabilities()
    # The second asks the system, which may withhold what the processor has.
    if platform.system() != "Linux" or not has.get("amx_bf16") or not torch.cpu._init_amx():
        raise RuntimeError("the processor has no AMX")
    compiler = _compiler()
    folder = Path(__file__).parent / "native"
    sources = [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
    parts = (*sources, torch.__version__.encode(), " ".join(FLAGS).encode())
    name = f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    built = _folder() / name
    if not _is_own(built):
        _build_once(compiler, folder / "kernels.cpp", built, tell or (lambda line: None))
    return built


def _build_once(compiler: str, source: Path, built: Path, tell: Callable[[str], None]) -> None:
    """Build the library, unless this very compiler has been found unable to."""
    failed = built.with_suffix(".failed")
    found = os.stat(compiler)
    key = f"{os.path.realpath(compiler)} {found.st_mtime_ns} {found.st_size}"
    if _is_own(failed):
        before, _, reason = failed.read_text(encoding="utf-8").partition("\n")
        if before == key:
            raise RuntimeError(reason)
    tell("Building the kernels for this processor, once: some seconds.")
    try:
        _compile(compiler, source, built)
    except subprocess.CalledProcessError as error:
        reason = f"{compiler} could not build them: {_reason(error)}"
        failed.touch(mode=0o600)
        failed.write_text(f"{key}\n{reason}", encoding="utf-8")
        tell(f"Going on without: {reason}. Another compiler is tried, this one if you rm {failed}")
        raise RuntimeError(reason) from None
    failed.unlink(missing_ok=True)


def _folder() -> Path:
    """Where libraries are kept: nobody else may put one where this process looks for it."""
    # Not with what torch compiles: that folder is as others on the machine may want it.
    folder = user_cache_dir() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        pass
    else:
        if _is_own(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    private = tempfile.mkdtemp(prefix="gristmill-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def _is_own(path: Path) -> bool:
    """Whether the path is there, belongs to this user, and nobody else can write it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _compile(compiler: str, source: Path, built: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder, built.name)
        command = [compiler, *FLAGS, f"-I{root / 'include'}", str(source), "-o", str(fresh)]
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([*command, *libraries], check=True, capture_output=True, text=True)
        # A umask may let a group write, and then it would never be loaded.
        fresh.chmod(0o700)
        # Whoever builds it at the same time puts the same there.
        os.replace(fresh, built)


@functools.cache
def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError("no C++ compiler is on the PATH (install g++)")

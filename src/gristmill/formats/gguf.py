"""GGUF files, the form of llama.cpp and its like: read as a model, and written.

Only what is quantised needs the package `gguf`, and writing does. The tables of names and metadata
are in `models/zoo/gguf.py`, the tokenizer in `tokenizer/gguf_vocabulary.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.formats.beside import beside, writing
from gristmill.formats.source import Entry, ModelDir, Tensors, TheirTensors
from gristmill.models import zoo
from gristmill.models.zoo import gguf as table
from gristmill.tokenizer import gguf_vocabulary
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError
from gristmill.util.extras import install_command
from gristmill.util.gguf_header import AGAIN, Header, TensorInfo, find_gguf, read_header, shortest

# The format's numbers of types that torch has too, and of the 8-bit one.
_F32, _F16, _Q8_0, _BF16 = 0, 1, 8, 30
_TORCH_TYPES = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
# Types that can be written, with the number of `general.file_type`.
_WRITTEN = {"float32": (_F32, 0), "float16": (_F16, 1), "bfloat16": (_BF16, 32), "q8_0": (_Q8_0, 7)}
_Q8_0_BLOCK = 32
# Matrices that llama.cpp wants in 32 bits whatever the others are.
_ALWAYS_F32 = ("position_embd.weight", "ffn_gate_inp.weight")
# What rounding to 32 bits takes from a weight that one is added to, so that none of it is lost.
_REST = "gristmill.rest."
# That a head is a parameter of its own, even if it has the values of the embedding just now.
_UNTIED = "gristmill.untied"
_COMPARED_BYTES = 1 << 20
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "weights")


def find(place: Path) -> ModelDir | None:
    """The model in a GGUF file, or in a directory with just one; None for other places.

    Raises UserError, naming the file, for one that is damaged or of an unknown architecture.
    """
    if (place / "config.json").is_file() and any(any(place.glob(name)) for name in _OTHER_WEIGHTS):
        return None  # a directory of another kind, with a copy in this format
    path = find_gguf(place)
    if path is None:
        return None
    header = read_header(path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    if not header.metadata.get(_UNTIED) and _is_copy(header, table.HEAD, table.EMBEDDING):
        del shapes[table.HEAD]  # some converters write a tied head out
    try:
        row = table.architecture(header.metadata)
        config = table.parse(row, header.metadata, shapes, partial(_numbers, header))
        config = _in_family(row, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ArithmeticError, TypeError, ValueError) as error:  # numbers that cannot be
        raise UserError(f"{path} is damaged in its metadata ({error}). {AGAIN}") from None
    config = replace(config, eos_token_id=gguf_vocabulary.stop_ids(header.metadata))
    tokens = gguf_vocabulary.num_tokens(header.metadata)
    if tokens is not None and tokens < config.vocab_size:
        config = replace(config, num_token_ids=tokens)
    return ModelDir(
        path=path,
        config=config,
        kind="gguf",
        open_tensors=partial(_open_tensors, header, config),
        weights=row.table(shapes),
        is_dropped=table.ROPE_TABLES.__contains__,
    )


def write(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_dir: str | Path | None,
    dtype: str = "float16",
) -> None:
    """Write the GGUF file `path` for llama.cpp: metadata, tokenizer and all tensors.

    tensors: parameter name -> full tensor, asked for one at a time. dtype: float32, float16,
    bfloat16 or q8_0 (8 bits and a scale for every 32 numbers); vectors stay in 32 bits. The file
    appears when it is complete. Raises UserError for a model or tokenizer that llama.cpp has no
    words for, RunError when writing fails.
    """
    library = _library(f"{path} cannot be written")
    out = Path(path)
    tokenizer = None if tokenizer_dir is None else Tokenizer.load(tokenizer_dir)

    def shapes(row: table.Architecture) -> dict[str, tuple[int, ...]]:
        return TheirTensors(row.table_for(config), config, tensors).shapes

    row = table.row_for(config, zoo.family(config.family).architecture, shapes)
    theirs = TheirTensors(row.table_for(config), config, tensors)
    with writing(out), beside(out) as place:
        writer = library.GGUFWriter(str(place.new), row.name)
        try:
            _add_metadata(writer, _general(config, dtype) | table.describe(row, config))
            _add_metadata(writer, _tokenizer_words(tokenizer, config))
            _write_tensors(library, writer, theirs, dtype)
        finally:
            writer.close()
        place.finish()


def _in_family(row: table.Architecture, config: ModelConfig) -> ModelConfig:
    """The same with its family: the architecture's own, or another that can express it."""
    for name in row.classes:
        for family in zoo.FAMILIES.values():
            if family.architecture == name and family.expresses(config):
                return replace(config, family=family.name)
    return zoo.family_for(config)


def _open_tensors(header: Header, config: ModelConfig) -> Tensors:
    entries = {}
    for name, info in header.tensors.items():
        _check_place(header, info)
        read = partial(_read_norm if _is_offset(config, name) else _read, header, info)
        entries[name] = Entry(header.path, read)
    return Tensors(entries)


def _is_offset(config: ModelConfig, name: str) -> bool:
    """Whether the tensor has one added in the file: llama.cpp multiplies by the weight itself."""
    return config.norm_unit_offset and name.endswith("norm.weight")


def _read_norm(header: Header, info: TensorInfo) -> Tensor:
    """A weight that has one added in the file, and what rounding that sum took from it."""
    weight = _read(header, info).float() - 1
    rest = header.metadata.get(_REST + info.name)
    return weight if rest is None else weight + torch.tensor(rest)


def _is_copy(header: Header, name: str, other: str) -> bool:
    """Whether two tensors are the same, byte for byte."""
    one, two = header.tensors.get(name), header.tensors.get(other)
    if one is None or two is None or (one.type, one.shape) != (two.type, two.shape):
        return False
    # Up to the next tensor, or the end: their types need not be known for that.
    starts = sorted({t.offset for t in header.tensors.values()} | {header.num_bytes})
    ends = [next((s for s in starts if s > t.offset), t.offset) for t in (one, two)]
    num_bytes = min(end - t.offset for end, t in zip(ends, (one, two)))
    with header.path.open("rb") as file:
        for at in range(0, num_bytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, num_bytes - at)
            file.seek(one.offset + at)
            part = file.read(size)
            file.seek(two.offset + at)
            if file.read(size) != part:
                return False
    return num_bytes > 0


def _check_place(header: Header, info: TensorInfo) -> None:
    """UserError when the tensor lies outside the file, or its type is not known."""
    end = info.offset + _num_bytes(header.path, info)
    if end > header.num_bytes:
        raise UserError(
            f"{header.path}: tensor {info.name} is cut off ({header.num_bytes} bytes in the file, "
            f"{end} needed). {AGAIN}"
        )


def _num_bytes(path: Path, info: TensorInfo) -> int:
    if info.type in _TORCH_TYPES:
        return prod(info.shape) * _TORCH_TYPES[info.type].itemsize
    library = _library(f"{path} is quantised and cannot be read")
    block, size = _block(library, path, info)
    return prod(info.shape) // block * size


def _block(library: ModuleType, path: Path, info: TensorInfo) -> tuple[int, int]:
    """Numbers and bytes in a block of the tensor's type."""
    try:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(info.type)]
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: tensor {info.name} has the unknown type {info.type}. Update the package: "
            "pip install --upgrade gguf"
        ) from None
    if info.shape[-1] % block:
        raise UserError(f"{path}: tensor {info.name} has rows of {info.shape[-1]} numbers. {AGAIN}")
    return block, size


def _read(header: Header, info: TensorInfo) -> Tensor:
    """A tensor of the file; what is quantised comes as float32."""
    path = header.path
    count = _num_bytes(path, info)
    data = np.fromfile(path, np.uint8, count, offset=info.offset)
    if len(data) != count:
        raise UserError(f"{path}: tensor {info.name} is cut off. {AGAIN}")
    if info.type in _TORCH_TYPES:
        return torch.from_numpy(data).view(_TORCH_TYPES[info.type]).view(info.shape)
    return _dequantise(path, info, data)


def _dequantise(path: Path, info: TensorInfo, data: np.ndarray[Any, Any]) -> Tensor:
    library = _library(f"{path} is quantised and cannot be read")
    kind = library.GGMLQuantizationType(info.type)
    block, size = _block(library, path, info)
    rows = data.reshape(*info.shape[:-1], info.shape[-1] // block * size)
    try:
        values = library.dequantize(rows, kind)
    except NotImplementedError:
        raise UserError(
            f"{path}: tensor {info.name} is of the type {kind.name}, which the package gguf cannot "
            "turn into numbers. Use a file of another quantisation, such as Q8_0 or Q4_K_M."
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(info.shape)


def _numbers(header: Header, name: str) -> list[float]:
    """The values of a small tensor."""
    info = header.tensors[name]
    _check_place(header, info)
    return [shortest(value) for value in _read(header, info).float().tolist()]


def _general(config: ModelConfig, dtype: str) -> dict[str, Any]:
    words: dict[str, Any] = {"general.type": "model", "general.name": config.name}
    words |= {} if config.tie_embeddings else {_UNTIED: True}
    return words | {"general.file_type": _WRITTEN[dtype][1], "general.quantization_version": 2}


def _tokenizer_words(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    return gguf_vocabulary.describe(tokenizer, config.vocab_size)


def _add_metadata(writer: Any, words: Mapping[str, Any]) -> None:
    for key, value in words.items():
        if key == table.ARCHITECTURE:
            continue  # the writer has put it first
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _write_tensors(library: ModuleType, writer: Any, theirs: TheirTensors, dtype: str) -> None:
    """The tensors' places, then their values, one at a time."""
    config = theirs.config
    factors = {k: np.array(v, np.float32) for k, v in table.rope_factors(config).items()}
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for name in theirs:
        if _is_offset(config, name):
            weight = theirs[name].detach().cpu().float()
            rest = weight - ((weight + 1) - 1)
            if rest.any():
                writer.add_array(_REST + name, rest.tolist())
    types = {name: _written_type(name, shape, dtype) for name, shape in theirs.shapes.items()}
    for name, shape in theirs.shapes.items():
        _add_info(library, writer, name, shape, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in factors.values():
        writer.write_tensor_data(values)
    for name in theirs:
        tensor = theirs[name].detach().cpu()
        if _is_offset(config, name):
            tensor = tensor.float() + 1
        writer.write_tensor_data(_encoded(library, tensor, types[name]))


def _written_type(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """The type that a tensor is written in."""
    if len(shape) == 1 or name.endswith(_ALWAYS_F32):
        return _F32
    kind = _WRITTEN[dtype][0]
    return _F16 if kind == _Q8_0 and shape[-1] % _Q8_0_BLOCK else kind


def _add_info(
    library: ModuleType, writer: Any, name: str, shape: tuple[int, ...], kind: int
) -> None:
    raw = library.GGMLQuantizationType(kind)
    block, size = library.GGML_QUANT_SIZES[raw]
    num_bytes = prod(shape) // block * size
    if kind == _Q8_0:
        shape = (*shape[:-1], shape[-1] // block * size)
    held = np.dtype(np.uint8 if kind == _Q8_0 else np.float32)
    writer.add_tensor_info(name, shape, held, num_bytes, raw_dtype=raw)


def _encoded(library: ModuleType, tensor: Tensor, kind: int) -> np.ndarray[Any, Any]:
    """The tensor as it lies in the file."""
    if kind == _Q8_0:
        numbers = tensor.float().contiguous().numpy()
        packed: np.ndarray[Any, Any] = library.quantize(numbers, library.GGMLQuantizationType(kind))
        return packed
    cast = tensor.to(_TORCH_TYPES[kind]).contiguous()
    return (cast.view(torch.int16) if kind == _BF16 else cast).numpy()


def _library(why: str) -> ModuleType:
    """The package gguf; UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{why} without the package gguf. Install it: {install_command('gguf')}"
        ) from None
    library: ModuleType = gguf
    return library

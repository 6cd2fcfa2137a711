"""Writing a model directory as Hugging Face tools load it: streaming, complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.formats.beside import building
from gristmill.formats.safetensors_io import write_file
from gristmill.formats.source import TheirTensors
from gristmill.models import zoo
from gristmill.models.counts import Shapes
from gristmill.tokenizer.sentencepiece_json import tokenizer_json
from gristmill.tokenizer.sidecar import DEFINITION, read_json
from gristmill.tokenizer.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5e9
TOKENIZER_WORDS = "tokenizer_config.json"


def write(
    out_dir: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_dir: str | Path | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    extra_files: Mapping[str, str] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write `config.json`, safetensors, `generation_config.json` and tokenizer files to `out_dir`.

    tensors: parameter name -> full tensor, asked for one at a time; `dtype` unset keeps that of the
    embedding. extra_files: name -> text of more files; `write_more` may add others to the directory
    that it is given. That is built beside `out_dir` and renamed, so that a visible one is complete;
    a directory in its place is replaced, so ask first.
    Raises UserError when the architecture has no word for the model, RunError when writing fails.
    """
    out = Path(out_dir)
    tokenizer = None if tokenizer_dir is None else Tokenizer.load(tokenizer_dir)
    if tokenizer is not None:
        # The ids that end a text are the tokenizer's, whatever the architecture's table says.
        config = replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.stop_ids)
    words = zoo.family(config.family).to_hf_config(config)
    dtype = dtype or tensors["embed.weight"].dtype
    words["torch_dtype"] = str(dtype).removeprefix("torch.")
    with building(out) as partial:
        _write_weights(partial, config, tensors, dtype, max_shard_bytes)
        write_companions(partial, config, words, tokenizer)
        for name, text in (extra_files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        if write_more is not None:
            write_more(partial)


def write_companions(
    directory: Path, config: ModelConfig, words: dict[str, Any] | None, tokenizer: Tokenizer | None
) -> None:
    """What lies beside weights: `config.json` of `words`, `generation_config.json`, tokenizer."""
    if tokenizer is not None:
        tokenizer.save(directory)
        _complete_tokenizer(directory, tokenizer)
    texts = {"config.json": words, "generation_config.json": _generation(config)}
    for name, value in texts.items():
        if value is not None:
            (directory / name).write_text(_json(value), encoding="utf-8")


def _write_weights(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: float,
) -> None:
    """The safetensors files, and their index when there are several."""
    theirs = TheirTensors(zoo.family(config.family).weight_table(config), config, tensors)
    shapes = theirs.shapes
    shards = _shards(shapes, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, dtype, theirs.__getitem__, theirs.wide)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        sizes = {name: 4 if name in theirs.wide else dtype.itemsize for name in shapes}
        total = sum(prod(shape) * sizes[name] for name, shape in shapes.items())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(_json(index))


def _shards(shapes: Shapes, itemsize: int, max_bytes: float) -> list[Shapes]:
    """The tensors in order, cut before each one that would make a file too large."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        tensor_bytes = prod(shape) * itemsize
        if shards[-1] and size + tensor_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += tensor_bytes
    return shards


def _generation(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: where texts start and end, and the rows that never stand for one.

    The rows behind the last token id were never trained, and could win over trained ones.
    """
    out: dict[str, Any] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if config.token_ids < config.vocab_size:
        out["suppress_tokens"] = list(range(config.token_ids, config.vocab_size))
    return out


def with_bos_policy(tokenizer: Tokenizer, *, adds_bos: bool) -> dict[str, str]:
    """The files, as name -> text, that make a copy of a tokenizer say whether prompts begin with
    BOS; none where it says so already."""
    if tokenizer.adds_bos == adds_bos:
        return {}
    words = read_json(tokenizer.path.parent / TOKENIZER_WORDS)
    if not words:
        return _own_files(tokenizer, adds_bos=adds_bos)
    return {TOKENIZER_WORDS: _json(words | {"add_bos_token": adds_bos})}


def _complete_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Say in `tokenizer_config.json` which class loads a lone `tokenizer.json` or `.model`.

    Without it `AutoTokenizer` takes the class of the model's architecture, or a wrong reading of a
    SentencePiece model, and cuts text otherwise than the file says without a word. That of
    transformers 5 drops a space that a text begins with: it gets a `tokenizer.json` where one says
    the same.
    """
    if not (directory / TOKENIZER_WORDS).exists():
        for name, text in _own_files(tokenizer, adds_bos=tokenizer.adds_bos).items():
            (directory / name).write_text(text, encoding="utf-8")


def _own_files(tokenizer: Tokenizer, *, adds_bos: bool) -> dict[str, str]:
    """What lies beside a tokenizer that came without settings: name -> text."""
    content = tokenizer_json(tokenizer, adds_bos=adds_bos)
    files = {} if content is None else {"tokenizer.json": content}
    words: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if tokenizer.kind == "tokenizers" or files:
        words["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        words |= {"tokenizer_class": zoo.SENTENCEPIECE_CLASS, "legacy": True}
    if files:
        words[DEFINITION] = "tokenizer.model"
    if tokenizer.kind != "tokenizers" or adds_bos != tokenizer.adds_bos:
        words["add_bos_token"] = adds_bos
    named = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    words |= {key: value for key, value in named.items() if value}
    return files | {TOKENIZER_WORDS: _json(words)}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

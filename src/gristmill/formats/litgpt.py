"""Checkpoints of LitGPT and its relatives: `lit_model.pth`, read in every form and written.

Read are flat tables and training checkpoints (`{"model": ...}`, weights only), one file or a
directory of pieces (`lit_model.pth/` with `.metadata`), `<folder>.consolidated`, both layouts of
fused query, key and value, TinyLlama's `iter-*-ckpt.pth` and lit-llama's files. The configuration
is `model_config.yaml` or `lit_config.json`: a `config.json` beside them belongs to the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.formats.beside import building
from gristmill.formats.hf import write_companions
from gristmill.formats.pickles import METADATA, PeekEntry, open_file, open_sharded
from gristmill.formats.source import AGAIN, Entry, ModelDir, Tensors, TheirTensors
from gristmill.formats.torch_file import write_torch_file
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.models.zoo import litgpt_weights as table
from gristmill.models.zoo.litgpt import parse, words
from gristmill.tokenizer import prompt_styles
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"
OLD_CONFIG = "lit_config.json"
CONSOLIDATED = ".consolidated"
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
# Where the weights are in a file with more than weights.
INSIDE = ("model", "state_dict")
Json = dict[str, Any]


def find(place: Path, model_name: str | None = None) -> ModelDir | None:
    """The model at `place`, which is a directory or a file; None where LitGPT left none.

    `model_name` is the architecture of weights without a configuration beside them.

    Raises UserError when weights are there and damaged, or nothing says what model they are of.
    """
    file = _weights(place)
    if file is None:
        return None
    entries = _entries(file)
    raw, config = _config(file, entries, model_name)
    config = replace(config, tie_embeddings=_is_tied(entries), **_text_ends(file.parent))
    with suppress(UserError):  # whoever writes it elsewhere says what is in the way
        config = zoo.family_for(config)
    weights = table.weights(config, entries, raw)
    tensors = Tensors(_turned(entries, config))
    # The path must lead to these weights again, where a directory has those of several steps.
    path = file if file == place else file.parent
    return ModelDir(path, config, "litgpt", lambda: tensors, weights, table.is_dropped)


def donor_note(source: ModelDir) -> str | None:
    """What there is to say of a `config.json` that came with the tokenizer, from another model.

    LitGPT's training copies it beside the weights; None where it fits them, or is not there.
    """
    file = (source.path if source.path.is_dir() else source.path.parent) / "config.json"
    if source.kind != "litgpt" or not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        other = zoo.family_of(raw).from_hf_config(raw)
        if parameter_shapes(other) == parameter_shapes(source.config):
            return None
        what = f"{(raw.get('architectures') or ['?'])[0]}, {other.num_layers} layers"
    except (UserError, ValueError, TypeError, AttributeError):
        what = "no model that is known"
    return (
        f"config.json is of another model ({what}): it came with the tokenizer and is not used. "
        "`gristmill export` writes the right one."
    )


def tensors_in(file: Path) -> Tensors:
    """The tensors of the model in a file, or directory of pieces, under LitGPT's plain names."""
    return Tensors(_entries(file))


def _weights(place: Path) -> Path | None:
    """The file, or directory of pieces, with the weights that `place` means."""
    if place.is_file():
        return place if place.suffix in (".pth", ".ckpt", CONSOLIDATED) else None
    if not place.is_dir() or (place / "checkpoint.json").exists():
        return None
    if (place / METADATA).is_file():
        return place
    for folder in (place, place / "final", *_newest_first(place.glob("step-*"))):
        for name in (WEIGHTS, WEIGHTS + CONSOLIDATED):
            if (folder / name).exists():
                return folder / name
    files = _newest_first(place.glob("*.pth"))
    steps = [file for file in files if re.match(r"(step|iter)-\d+", file.name)]
    configured = any((place / name).is_file() for name in (CONFIG, OLD_CONFIG))
    if steps and not (place / "config.json").is_file():
        return steps[0]
    return files[0] if configured and len(files) == 1 else None


def _newest_first(paths: Any) -> list[Path]:
    """Paths such as step-00001000, by their number."""

    def number(path: Path) -> tuple[int, str]:
        digits = re.search(r"-(\d+)", path.name)
        return (int(digits.group(1)) if digits else -1, path.name)

    return sorted(paths, key=number, reverse=True)


def _entries(file: Path) -> dict[str, PeekEntry]:
    """The tensors of the model under their plain names."""
    if file.is_dir():
        found = open_sharded(file)
        for key in INSIDE:
            inner = {n: e for n, e in found.items() if n.startswith(f"{key}.")}
            if inner:
                found = {name.removeprefix(f"{key}."): entry for name, entry in inner.items()}
    else:
        found = open_file(file, INSIDE)
    entries = {table.unwrapped(name): entry for name, entry in found.items()}
    if EMBEDDING not in entries:
        some = ", ".join(list(entries)[:3]) or "nothing"
        raise UserError(
            f"{file} has no tensor {EMBEDDING} (it has {some}): it is no checkpoint of LitGPT. "
            "Name a model directory, such as out/quickstart/run."
        )
    return entries


def _config(
    file: Path, entries: Mapping[str, Entry], model_name: str | None
) -> tuple[Json | None, ModelConfig]:
    """The words of the configuration that belongs to the weights, and what they say."""
    for path in (file.parent / CONFIG, file.parent / OLD_CONFIG):
        if not path.is_file():
            continue
        # YAML takes JSON's 1e-05 for a text.
        read = json.loads if path.suffix == ".json" else yaml.safe_load
        try:
            raw = read(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged ({reason}). {AGAIN}") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path} is damaged (no table of settings). {AGAIN}")
        try:
            return raw, parse(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path} has a value that makes no model ({error}). {AGAIN}") from None
    return None, _config_without_file(file, entries, model_name)


def _config_without_file(
    file: Path, entries: Mapping[str, Entry], model_name: str | None
) -> ModelConfig:
    """By the name given, or that of the directory, as LitGPT does, or by the shapes of tensors."""
    rows, hidden = entries[EMBEDDING].read().shape
    if model_name is not None or file.parent.name in zoo.names():
        return replace(zoo.get(model_name or file.parent.name), vocab_size=rows)
    inner = entries.get("transformer.h.0.mlp.c_fc1.weight")
    if inner is not None:
        layers = 1 + max(int(n) for n in re.findall(r"\.h\.(\d+)\.", " ".join(entries)))
        config = table.config_from_shapes(layers, rows, hidden, inner.read().shape[0])
        if config is not None:
            return config
    raise UserError(
        f"{file} comes without its configuration. Put the {CONFIG} (or {OLD_CONFIG}) of the model "
        f"into {file.parent}, or name the architecture: gristmill export {file} OUT --model_name …"
    )


def _is_tied(entries: Mapping[str, PeekEntry]) -> bool:
    """Whether output head and embedding are one matrix: LitGPT's files have both, and no word."""
    if HEAD not in entries:
        return True
    head, embedding = entries[HEAD], entries[EMBEDDING]
    if not _equal(head.peek(), embedding.peek()):
        return False  # a row tells most models apart
    return _equal(head.read(), embedding.read())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _text_ends(directory: Path) -> Json:
    """BOS and EOS ids, which the tokenizer's files say."""
    for name in ("generation_config.json", "config.json"):
        try:
            raw = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id")}
        if any(value is not None for value in ids.values()):
            return {k: tuple(v) if isinstance(v, list) else v for k, v in ids.items()}
    return {}


def _turned(entries: Mapping[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    """lit-llama rotates pairs of neighbours: query and key rows go to halves as they are read."""
    return {
        name: Entry(entry.file, partial(_to_halves, entry, config))
        if name.endswith("attn.c_attn.weight")
        else entry
        for name, entry in entries.items()
    }


def _to_halves(entry: Entry, config: ModelConfig) -> Tensor:
    fused = entry.read()
    rows = (config.num_heads + config.kv_heads) * config.head_size
    if fused.dim() != 2 or fused.shape[0] <= rows:
        return fused  # of a wrong shape, which is told where shapes are checked
    pairs = fused[:rows].reshape(-1, config.head_size // 2, 2, fused.shape[1])
    return torch.cat((pairs.transpose(1, 2).flatten(0, 2), fused[rows:]))


def write(
    out_dir: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer_dir: str | Path | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a directory that LitGPT 0.5.13 reads, for use and for `--initial_checkpoint_dir`.

    It has `lit_model.pth` (a flat table), `model_config.yaml`, the tokenizer's files, the model's
    own `config.json` and `generation_config.json`, and `prompt_style.yaml` where the chat template
    is one of LitGPT's styles. tensors: parameter name -> full tensor, asked for one at a time;
    `dtype` unset keeps that of the embedding. The directory is built beside `out_dir` and renamed;
    one in its place is replaced, so ask first. Raises UserError naming the switches that LitGPT
    has no word for, RunError when writing fails.
    """
    out = Path(out_dir)
    tokenizer = None if tokenizer_dir is None else Tokenizer.load(tokenizer_dir)
    if tokenizer is not None:
        config = replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.stop_ids)
    known = zoo.models().get(config.name)
    settings = words(config, repository=known.repo if known else None)
    dtype = dtype or tensors["embed.weight"].dtype
    theirs = TheirTensors(table.weights(config), config, tensors)
    shapes, same = dict(theirs.shapes), {}
    if config.tie_embeddings:
        same[HEAD] = EMBEDDING
        shapes[HEAD] = shapes[EMBEDDING]
    dtypes = {name: torch.float32 if name in theirs.wide else dtype for name in shapes}
    hf_words = _hugging_face_words(config, dtype)
    with building(out) as directory:
        write_torch_file(directory / WEIGHTS, shapes, dtypes, theirs.__getitem__, same=same)
        (directory / CONFIG).write_text(yaml.safe_dump(settings), encoding="utf-8")
        write_companions(directory, config, hf_words, tokenizer)
        style = None
        if tokenizer is not None:
            style = prompt_styles.kind_of(tokenizer.chat_template, tokenizer.bos_token)
        if style is not None:
            prompt_styles.write_style(directory, style)


def _hugging_face_words(config: ModelConfig, dtype: torch.dtype) -> Json | None:
    """`config.json`, None where no architecture has all switches of the model."""
    try:
        out = zoo.family(config.family).to_hf_config(config)
    except UserError:
        return None
    return out | {"torch_dtype": str(dtype).removeprefix("torch.")}

"""What lies at a path: a run, a checkpoint, a model of any layout, a tokenizer, a dataset.

Configurations, headers and sizes are read, never weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gristmill.checkpoint import store
from gristmill.config.model import ModelConfig
from gristmill.data.look.find import is_dataset
from gristmill.data.preparation.workspace import NAME as UNFINISHED_DATASET
from gristmill.data.store.dataset import Dataset
from gristmill.formats.litgpt import donor_note
from gristmill.formats.model_dir import open_model_dir, read_config
from gristmill.formats.safetensors_io import read_header
from gristmill.formats.source import ModelDir, Tensors
from gristmill.formats.tokenizer_files import find_tokenizer
from gristmill.models import zoo
from gristmill.models.counts import num_parameters, parameter_shapes
from gristmill.tokenizer.sidecar import read_json
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util import gguf_header
from gristmill.util.errors import MissingPackage, RunError, UserError
from gristmill.util.paths import download_command, how_to_get, resolve_model_dir

RUN_FILE = "run.yaml"
TRAINING_FILE = "training.json"
DOWNLOAD_PARTS = ".gristmill/download"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.ckpt", "*.distcp")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SETTINGS = ("config.json", "model_config.yaml", "lit_config.json")
MAPPED = (".bin", ".pth", ".pt", ".ckpt", ".consolidated")
GGUF_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
GGUF_TYPES |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}
TYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

KINDS = {
    "checkpoint": "training checkpoint",
    "huggingface": "Hugging Face directory",
    "litgpt": "LitGPT checkpoint",
    "gguf": "GGUF file",
    "peft": "adapter, used with its base",
}


@dataclass
class Found:
    """What is known of a path; `problems` are sentences that say what is wrong and what to do."""

    path: str
    kind: str
    model: dict[str, Any] = field(default_factory=dict)
    """architecture, name, family, parameters, context, vocab_size, num_token_ids, dtypes …"""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """kind, num_token_ids, bos, eos, chat_template; or `unread`, the package that is missing."""
    training: dict[str, Any] = field(default_factory=dict)
    """step, tokens, samples; of a run also checkpoints, newest and final."""
    dataset: dict[str, Any] = field(default_factory=dict)
    """tokens, documents, chunks."""
    num_bytes: int = 0
    num_files: int = 0
    problems: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data; empty parts are left out."""
        values = {**asdict(self), "complete": not self.problems}
        return {key: value for key, value in values.items() if value not in ({}, None)}


def identify(path: str | Path) -> Found:
    """What is at `path`. Raises UserError when nothing is there that is known."""
    place = resolve_model_dir(path)
    if not place.exists():
        raise UserError(f"{path} does not exist. {how_to_get(path)}")
    found = _file(place) if place.is_file() else _directory(place)
    if place.is_dir():
        sizes = list(_sizes(place))
        found.num_bytes, found.num_files = sum(sizes), len(sizes)
    else:
        found.num_bytes, found.num_files = place.stat().st_size, 1
    return found


def _sizes(place: Path) -> Iterator[int]:
    """Sizes of all files below; what a running training removes meanwhile is not there."""
    for folder, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.stat(os.path.join(folder, name))
                if stat.S_ISREG(found.st_mode):
                    yield found.st_size


def _directory(place: Path) -> Found:
    if is_dataset(place) or any(is_dataset(place / name) for name in ("train", "val")):
        return _dataset(place)
    if (place / UNFINISHED_DATASET).is_dir():
        found = Found(str(place), "unfinished dataset")
        found.problems.append(
            f"the preparation of {place} has not ended. Run its `gristmill prepare` command again: "
            f"it goes on; `gristmill prepare status {place}` shows how far it is."
        )
        return found
    if (place / RUN_FILE).is_file() or _step_dirs(place) or (place / "final").is_dir():
        return _run(place)
    if (place / "weights").is_dir() and (place / "config.json").is_file():
        return _checkpoint(place)
    there = _files(place)
    parts = list((place / DOWNLOAD_PARTS).glob("*.part"))
    if parts and (there is None or there.problems or not _has_weights(place)):
        found = Found(str(place), "unfinished download")
        found.problems.append(
            f"{len(parts)} files of {place} are not here yet. "
            "Run its `gristmill download` command again: it goes on."
        )
        return found
    if there is not None:
        return there
    raise UserError(
        f"{place} holds no model, tokenizer or dataset (no config.json, no step-*/, no weights). "
        "Name the directory that does."
    )


def _files(place: Path) -> Found | None:
    """A directory of a model's files, or of some of them."""
    if _has_weights(place):
        return _model(place)
    if any((place / name).is_file() for name in TOKENIZERS):
        return _tokenizer_only(place)
    if any((place / name).is_file() for name in SETTINGS):
        return _no_weights(place)
    return None


def _file(place: Path) -> Found:
    """A file by its name; weights that need a configuration are shown with their directory's."""
    if place.name in TOKENIZERS or place.suffix == ".model":
        found = Found(str(place), "tokenizer file")
        _add_tokenizer(found, place)
        found.commands.append(f"gristmill prepare LAYOUT --tokenizer_dir {_quoted(place)} …")
        return found
    if place.suffix in (".safetensors", ".bin"):
        for folder in (place.parent, place.parent.parent):
            if (folder / "config.json").is_file():
                return _directory(folder)
    if place.suffix == ".safetensors":
        found = Found(str(place), "safetensors file, without the config.json of a model")
        _add_headers(found, None, [place], str)
        return found
    if place.suffix in (".gguf", ".pth", ".ckpt", ".consolidated"):
        return _model(place)
    if place.name in (*SETTINGS, RUN_FILE, store.RECORD_NAME):
        return _directory(place.parent)
    raise UserError(
        f"{place} is no file of a model, tokenizer or dataset. Name a directory, or one of these "
        "files: .safetensors, .gguf, .pth, tokenizer.json, tokenizer.model."
    )


def _dataset(place: Path) -> Found:
    found = Found(str(place), "dataset")
    parts = [place, place / "train", place / "val"]
    totals: Counter[str] = Counter()
    for part in filter(is_dataset, parts):
        try:
            dataset = Dataset.open(part)
        except (UserError, RunError) as error:
            found.problems.append(str(error))
            continue
        totals += Counter(
            tokens=dataset.num_tokens, documents=dataset.num_documents, chunks=len(dataset.chunks)
        )
        found.dataset.setdefault("parts", []).append(part.name if part != place else ".")
    found.dataset |= dict(totals)
    found.commands += [
        f"gristmill data stats {_quoted(place)}",
        f"gristmill data verify {_quoted(place)}",
        f"gristmill pretrain MODEL --data {_quoted(place)}",
    ]
    if any((part / "tokenizer").is_dir() for part in parts):
        _add_tokenizer(found, next(part for part in parts if (part / "tokenizer").is_dir()))
    return found


def _run(place: Path) -> Found:
    """A run directory: its newest complete checkpoint, and `final/` where it has ended."""
    complete = store.complete(place)
    final = place / "final"
    if final.is_dir():
        found = _model(final)
        if found.kind == KINDS["litgpt"]:
            return found
    elif complete:
        found = _checkpoint(complete[0])
    elif _step_dirs(place):
        # Another tool's run, perhaps.
        found = _model(_step_dirs(place)[-1])
        if found.kind != KINDS["checkpoint"]:
            return found
    else:
        found = Found(str(place), "run directory")
        found.problems.append(
            f"the run in {place} has no checkpoint yet. "
            "Run its `gristmill pretrain` command again: it starts or goes on."
        )
        return found
    found.path, found.kind = str(place), "run directory"
    unfinished = [p.name for p in _step_dirs(place) if p not in complete]
    if complete:
        found.training.clear()
        found.problems += _add_record(found, complete[0])
    found.training |= {
        "checkpoints": [p.name for p in complete],
        "unfinished": unfinished,
        "final": final.is_dir(),
        **_length(place),
    }
    found.commands = _model_commands(found, place)
    return found


def _checkpoint(place: Path) -> Found:
    """One of our training checkpoints."""
    found = Found(str(place), KINDS["checkpoint"])
    found.problems += _add_record(found, place)
    if found.problems:
        return found
    _add_model(found, place)
    if "base" in found.model:
        found.commands = _model_commands(found, place)
        return found
    found.commands = [
        f"gristmill pretrain --resume {_quoted(place)} --out_dir NEW …",
        *_model_commands(found, place),
    ]
    return found


def _model(place: Path) -> Found:
    """A model directory or file of any layout."""
    found = Found(str(place), "model directory")
    _add_model(found, place)
    if (place / TRAINING_FILE).is_file():
        trained = read_json(place / TRAINING_FILE)
        found.training |= {key: trained[key] for key in ("step", "tokens") if key in trained}
    found.commands = _model_commands(found, place)
    return found


def _tokenizer_only(place: Path) -> Found:
    found = Found(str(place), "tokenizer")
    if any((place / name).is_file() for name in SETTINGS):
        found = _no_weights(place)
        found.kind = "tokenizer and settings of a model, no weights"
    _add_tokenizer(found, place)
    found.commands.insert(0, f"gristmill prepare LAYOUT --tokenizer_dir {_quoted(place)} …")
    return found


def _no_weights(place: Path) -> Found:
    found = Found(str(place), "settings of a model, no weights")
    try:
        _describe(found, read_config(place))
    except UserError as error:
        found.model["note"] = str(error)
    if (fetch := download_command(place)) is not None:
        found.commands.append(fetch)
    return found


def _add_model(found: Found, place: Path) -> None:
    """What the configuration and the headers of a model say, and what does not fit."""
    try:
        source = open_model_dir(place)
    except (UserError, RunError) as error:
        found.problems.append(str(error))
        return
    found.kind = KINDS.get(source.kind, source.kind)
    _describe(found, source.config)
    if (note := donor_note(source)) is not None:
        found.model["note"] = note
    try:
        found.problems += _add_weights(found, source)
    except (UserError, RunError) as error:
        found.problems.append(str(error))
        return
    tokens = _add_tokenizer(found, source)
    if tokens is not None and tokens > source.config.vocab_size:
        found.problems.append(
            f"the tokenizer has ids up to {tokens - 1:,}, the model {source.config.vocab_size:,} "
            "rows. Put the tokenizer that the model was trained with into its directory."
        )


def _describe(found: Found, config: ModelConfig) -> None:
    found.model |= {
        "name": config.name,
        "architecture": zoo.family(config.family).architecture,
        "parameters": num_parameters(config),
        "layers": config.num_layers,
        "width": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "context": config.max_seq_length,
        "vocab_size": config.vocab_size,
        "num_token_ids": config.token_ids,
        "tied": config.tie_embeddings,
    }
    if config.adaption_prompt is not None:
        found.model["adaption_prompt"] = asdict(config.adaption_prompt)


def _add_weights(found: Found, source: ModelDir) -> list[str]:
    """Types and number of the weights; which have another size than the configuration says.

    Raises UserError for missing, superfluous and damaged ones.
    """
    tensors = source.tensors()
    if source.base is not None:
        found.model["base"] = str(source.base.path)
        return _add_weights(found, source.base)
    files = sorted({tensors.file_of(name) for name in tensors})
    found.model |= {"tensors": len(tensors), "weight_files": len(files)}
    if all(file.suffix == ".safetensors" for file in files):
        rename = zoo.family(source.config.family).rename if source.weights else str
        return _add_headers(found, source, files, rename)
    if source.kind == "gguf":
        infos = gguf_header.read_header(files[0]).tensors.values()
        found.model["dtypes"] = _types((GGUF_TYPES.get(t.type, "?"), prod(t.shape)) for t in infos)
    elif all(file.suffix in MAPPED for file in files):
        found.model["dtypes"] = _types(_peeked(source, tensors))
    return []


def _peeked(source: ModelDir, tensors: Tensors) -> Iterator[tuple[str, int]]:
    """Types of tensors in pickles, and how many numbers belong to each, without reading them."""
    ours = parameter_shapes(source.config)
    for conversion in source.conversions():
        entry = tensors.entries[conversion.theirs[0]]
        peek = getattr(entry, "peek", entry.read if entry.file.suffix == ".bin" else None)
        if peek is not None:  # of a .bin, tensors are mapped
            yield str(peek().dtype), sum(prod(ours[name]) for name in conversion.ours)


def _add_headers(
    found: Found, source: ModelDir | None, files: list[Path], rename: Callable[[str], str]
) -> list[str]:
    """Types of the tensors in safetensors files, and those of a wrong size."""
    sizes: Counter[str] = Counter()
    types: list[tuple[str, int]] = []
    for file in files:
        for name, entry in read_header(file).items():
            if name != "__metadata__":
                sizes[rename(name)] += prod(entry["shape"])
                types.append((entry["dtype"], prod(entry["shape"])))
    found.model |= {"tensors": len(sizes), "weight_files": len(files), "dtypes": _types(types)}
    if source is None:
        return []
    ours = parameter_shapes(source.config)
    wrong = [
        conversion.theirs[0]
        for conversion in source.conversions()
        if sum(sizes[name] for name in conversion.theirs)
        != sum(prod(ours[name]) for name in conversion.ours)
    ]
    if not wrong:
        return []
    return [
        f"{wrong[0]} has another size than config.json makes it ({len(wrong)} such tensors). "
        "Use the config.json that belongs to these weights."
    ]


def _types(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Name of a type -> numbers of that type."""
    counted: Counter[str] = Counter()
    for name, size in sizes:
        counted[TYPE_NAMES.get(name, name).removeprefix("torch.")] += size
    return dict(counted.most_common())


def _add_tokenizer(found: Found, place: Path | ModelDir) -> int | None:
    """What the tokenizer there is; its number of ids."""
    try:
        tokenizer = Tokenizer.load(place) if isinstance(place, Path) else find_tokenizer(place)
    except MissingPackage as error:
        found.tokenizer = {"unread": str(error)}
        return None
    except UserError as error:
        if "no tokenizer at" not in str(error):
            found.problems.append(str(error))
        return None
    if tokenizer is None:
        return None
    found.tokenizer = {
        "kind": tokenizer.kind,
        "file": str(tokenizer.path),
        "num_token_ids": tokenizer.num_token_ids,
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template is not None,
    }
    return tokenizer.num_token_ids


def _add_record(found: Found, checkpoint: Path) -> list[str]:
    """Step and tokens of a checkpoint; files that differ from its record in size."""
    try:
        record = store.read_record(checkpoint)
    except RunError as error:
        return [str(error)]
    keys = ("step", "samples", "tokens", "optimizer")
    found.training |= {key: record[key] for key in keys if key in record}
    for name, stated in record["files"].items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != stated["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes, not {stated['bytes']:,}"
            return [f"{file} {what}. Go on from an earlier checkpoint, or copy it again."]
    return []


def _length(run: Path) -> dict[str, Any]:
    """How many steps a run has in all, from its settings."""
    import yaml

    try:
        saved = yaml.safe_load((run / RUN_FILE).read_text(encoding="utf-8"))
        return {"total_steps": int(saved["length"]["total_steps"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}


def _model_commands(found: Found, place: Path) -> list[str]:
    """What can be done with a model; without a tokenizer it neither writes nor chats."""
    name = _quoted(place)
    pretrain = f"gristmill pretrain --initial_checkpoint_dir {name} --data … --out_dir NEW"
    if not found.tokenizer:
        given = "--tokenizer_dir …"
        return [f"{pretrain} {given}", f"gristmill export {name} OUT --format hf {given}"]
    use = [f"gristmill chat {name}", f"gristmill generate {name} --prompt …"]
    if "base" in found.model:
        mergeable = "adaption_prompt" not in found.model
        return [*use, *([f"gristmill merge {name} OUT"] if mergeable else [])]
    return [*use, pretrain, f"gristmill export {name} OUT --format hf"]


def _quoted(place: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(place))


def _step_dirs(place: Path) -> list[Path]:
    """Directories named as checkpoints are, oldest first."""
    found = [p for p in place.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def _has_weights(place: Path) -> bool:
    return any(next(place.glob(pattern), None) for pattern in WEIGHTS) or any(
        (place / name).is_dir() for name in ("lit_model.pth",)
    )


def dump(found: Found) -> str:
    """One JSON object."""
    return json.dumps(found.to_json(), indent=1, ensure_ascii=False)

"""LoRA and DoRA in PEFT's layout, read and written.

For a module of the Hugging Face model there are `lora_A`, `lora_B` and `lora_magnitude_vector` (see
`adapted.LowRank`). A tensor that holds several matrices of ours (query, key and value, say) has one
adapter for all of them: its A is theirs on top of each other, its B has theirs as blocks on the
diagonal, with rows where the layout has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.formats.adapted import (
    ADAPTER_CONFIG,
    AdapterFiles,
    Change,
    Factors,
    Json,
    LowRank,
    adapted,
    is_prompt,
)
from gristmill.formats.layouts import to_ours, to_theirs
from gristmill.formats.source import AGAIN, ModelDir, Tensors
from gristmill.models import zoo
from gristmill.models.counts import Shapes, parameter_shapes
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.weights import Conversion, conversions
from gristmill.util.errors import UserError

PREFIX = "base_model.model."

CHANGES_NOTHING = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "peft_version", "library_name", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"),
    *("ensure_weight_tying", "velora_config", "parent_library"),
}
"""Settings of LoRA that are read, or that say nothing about what the tensors mean."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Ways to begin that put something else in the place of the base's weights."""
ROWS = {"transposed": "same", "blocks_transposed": "blocks"}
"""How rows of a matrix lie, by the layout of the matrix; by its own name where it is not here."""
SEVERAL = ("experts", "stacked_blocks")
"""Layouts of matrices that lie in a stack."""
PART = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?$"
)


def open_adapted(place: Path, settings: Json, files: Tensors, base: ModelDir) -> ModelDir:
    """The model of low-rank adapters in `files` and of their base."""
    _check_settings(place, settings)
    table, family = _table(base.config), zoo.family(base.config.family)
    shapes = parameter_shapes(base.config)
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in files:
        match = PART.search(name)
        if match is None:
            whole[_in_files(family, name.replace(".modules_to_save.default.", "."))] = name
        else:
            module = _in_files(family, name[: match.start()] + ".weight")
            parts.setdefault(module, {})[match.group(1)] = name
    changes: dict[str, Change] = {}
    for theirs in (*parts, *whole):
        if theirs not in table:
            raise UserError(
                f"{place}: the adapter has tensors for {theirs.removesuffix('.weight')}, which "
                f"{base.path} does not have. Name the model that it was trained for as "
                f"base_model_name_or_path in {place / ADAPTER_CONFIG}."
            )
        _check_untied(place, base.config, table[theirs][0])
    for theirs, named in whole.items():
        conversion, _ = table[theirs]
        if len(conversion.theirs) > 1:
            raise UserError(f"{place}: {theirs} is replaced, which is not supported for experts.")
        for index, ours in enumerate(conversion.ours):
            changes[ours] = _Replaced(files, named, conversion, index, base.config, shapes)
    for theirs, tensors in parts.items():
        conversion, expert = table[theirs]
        piece = _Piece(files, tensors, _scale(settings, theirs), conversion, base.config, shapes)
        _check_piece(place, theirs, piece)
        for index, ours in enumerate(conversion.ours):
            if conversion.layout == "experts":
                change = changes.setdefault(ours, _OfExperts({}))
                assert isinstance(change, _OfExperts)
                change.pieces[expert] = piece
            else:
                changes[ours] = partial(_apply, piece, index)
    file = next(iter(files.entries.values())).file if len(files) else place
    return adapted(place, base, changes, "peft", files=dict.fromkeys(changes, file))


def _in_files(family: Family, theirs: str) -> str:
    """The name in files of a parameter of the model, which may have another in memory."""
    for file, module in family.modules.items():
        if theirs.startswith(f"{module}."):
            theirs = file + theirs.removeprefix(module)
    return family.rename(theirs)


def _check_settings(place: Path, settings: Json) -> None:
    begin = settings.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{place}: the adapter began as {begin} (init_lora_weights), which changes the base as "
            "well. Save it anew as an ordinary one: PEFT's save_pretrained has "
            "path_initial_model_for_weight_conversion for that."
        )
    for key, value in settings.items():
        if key not in CHANGES_NOTHING and value:
            raise UserError(
                f"{place / ADAPTER_CONFIG} has {key}={value!r}, which is not supported. Merge the "
                "adapter into its base with the tool that made it."
            )


def _check_untied(place: Path, config: ModelConfig, conversion: Conversion) -> None:
    if config.tie_embeddings and conversion.ours == ("embed.weight",):
        raise UserError(
            f"{place}: the adapter changes the embedding of a model whose output head is the "
            "embedding, and leaves the head as it was. Merge it with the tool that made it."
        )


def _scale(settings: Json, theirs: str) -> Callable[[int], float]:
    """What B A is multiplied with, by the rank r: alpha / r, or alpha / sqrt(r)."""
    module = theirs.removesuffix(".weight")
    alpha = float(settings.get("lora_alpha", 8))
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    stabilised = bool(settings.get("use_rslora"))
    return lambda rank: alpha / (math.sqrt(rank) if stabilised else rank)


@dataclass(frozen=True)
class _Piece:
    """The adapter of one tensor of the Hugging Face model, read when asked for."""

    files: Tensors
    names: Mapping[str, str]
    scale: Callable[[int], float]
    conversion: Conversion
    config: ModelConfig
    shapes: Shapes

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [r, in], B [out, r], and the magnitude [out, 1], if any, of a matrix [out, in]."""
        if "lora_embedding_A" in self.names:
            a, b = (self.files[self.names[f"lora_embedding_{which}"]] for which in "AB")
            return b.t(), a.t(), None  # for the table [in, out]
        a, b = (self.files[self.names[f"lora_{which}"]] for which in "AB")
        magnitude = self.names.get("lora_magnitude_vector")
        return a, b, None if magnitude is None else self.files[magnitude].reshape(-1, 1)

    def of(self, index: int) -> LowRank:
        """The part for one of our parameters in the tensor."""
        a, b, magnitude = self.factors()
        if self.conversion.layout != "experts":
            shapes = [self.shapes[name] for name in self.conversion.ours]
            layout = ROWS.get(self.conversion.layout, self.conversion.layout)
            b = to_ours(layout, [b], self.config, shapes)[index]
            if magnitude is not None:
                magnitude = to_ours(layout, [magnitude], self.config, shapes)[index]
        scale = self.scale(a.shape[0])
        return LowRank(a, b, scale, None if magnitude is None else magnitude.flatten())


def _apply(piece: _Piece, index: int, weight: Tensor) -> Tensor:
    return piece.of(index)(weight)


@dataclass(frozen=True)
class _OfExperts:
    """Adapters of some of the experts [E, out, in] that lie in a stack."""

    pieces: dict[int, _Piece]

    def __call__(self, weight: Tensor) -> Tensor:
        """The changed stack."""
        changed = weight.clone()
        for expert, piece in self.pieces.items():
            changed[expert] = piece.of(0)(weight[expert])
        return changed


@dataclass(frozen=True)
class _Replaced:
    """A parameter that the adapter brings whole."""

    files: Tensors
    name: str
    conversion: Conversion
    index: int
    config: ModelConfig
    shapes: Shapes

    def __call__(self, weight: Tensor) -> Tensor:
        """The adapter's own."""
        shapes = [self.shapes[name] for name in self.conversion.ours]
        tensor = self.files[self.name]
        return to_ours(self.conversion.layout, [tensor], self.config, shapes)[self.index].float()


def _check_piece(place: Path, theirs: str, piece: _Piece) -> None:
    """UserError when half of an adapter is missing, or it has another shape than its matrix."""
    module, known = theirs.removesuffix(".weight"), set(piece.names)
    if not ({"lora_A", "lora_B"} <= known or {"lora_embedding_A", "lora_embedding_B"} <= known):
        raise UserError(f"{place}: {module} has {', '.join(sorted(known))} alone. {AGAIN}")
    if piece.conversion.layout == "stacked_blocks":
        raise UserError(
            f"{place}: {module} is a stack of experts, whose adapters are not supported. Merge it "
            "with the tool that made it."
        )
    a, b, _ = piece.factors()
    shapes = [piece.shapes[name] for name in piece.conversion.ours]
    rows = sum(shape[-2] for shape in shapes)
    if (b.shape[0], a.shape[1]) != (rows, shapes[0][-1]) or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{place}: the adapter of {module} is {list(b.shape)} by {list(a.shape)}, but the "
            f"matrix is {[rows, shapes[0][-1]]}. Name the model that it was trained for as "
            f"base_model_name_or_path in {place / ADAPTER_CONFIG}."
        )


def lora_files(
    config: ModelConfig,
    factors: Mapping[str, Factors],
    *,
    alpha: float,
    dropout: float,
    base: str,
    row_lengths: Callable[[str], Tensor] | None = None,
) -> AdapterFiles:
    """The adapter of a model for PEFT, exactly: the same sums under Hugging Face's names.

    factors: by our names of matrices; all of one rank. `row_lengths(name)` gives the lengths of the
    rows of a matrix of the base, for those that lie in one tensor with a matrix that has a
    magnitude. `alpha` over the rank is what B A is multiplied with. Raises UserError for matrices
    whose adapters PEFT has no place for.
    """
    rank = next(iter(factors.values())).a.shape[0]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    table = dict.fromkeys(conversion for conversion, _ in _table(config).values())
    modules = zoo.family(config.family).modules
    for conversion in table:
        parts = [factors.get(name) for name in conversion.ours]
        if not any(parts):
            continue
        if conversion.layout in SEVERAL:
            raise UserError(f"PEFT has no layout for an adapter of {conversion.ours[0]}.")
        module = conversion.theirs[0].removesuffix(".weight")
        ranks[module] = sum(part.a.shape[0] for part in parts if part is not None)
        joined = _joined(config, conversion, parts, row_lengths)
        for place in dict.fromkeys((module, modules.get(module, module))):
            tensors |= {f"{PREFIX}{place}.{name}": value for name, value in joined.items()}
    names = _short_names(config, list(ranks))
    wide = {names[module]: r for module, r in ranks.items() if r != rank}
    settings: Json = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({*names.values(), *(modules.get(m, names[m]) for m in names)}),
        "rank_pattern": wide,
        # The factor of B A stays what it is for each of the matrices in a tensor.
        "alpha_pattern": {name: alpha * r / rank for name, r in wide.items()},
        "use_dora": any(f.magnitude is not None for f in factors.values()),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": any("transposed" in c.layout for c in table),
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return AdapterFiles(tensors, settings)


def _joined(
    config: ModelConfig,
    conversion: Conversion,
    parts: Sequence[Factors | None],
    row_lengths: Callable[[str], Tensor] | None,
) -> dict[str, Tensor]:
    """The one adapter of a tensor that holds several matrices, some of which have one."""
    given = [part for part in parts if part is not None]
    shapes = parameter_shapes(config)
    total = sum(part.a.shape[0] for part in given)
    layout, column = ROWS.get(conversion.layout, conversion.layout), 0
    blocks, lengths = [], []
    for name, part in zip(conversion.ours, parts, strict=True):
        block = given[0].b.new_zeros(shapes[name][0], total)
        if part is not None:
            block[:, column : column + part.b.shape[1]] = part.b
            column += part.b.shape[1]
        blocks.append(block)
        magnitude = None if part is None else part.magnitude
        if magnitude is None and given[0].magnitude is not None:
            assert row_lengths is not None, "a matrix without magnitude lies beside one with it"
            magnitude = row_lengths(name)
        if magnitude is not None:
            lengths.append(magnitude.reshape(-1, 1))
    out = {"lora_A.weight": torch.cat([part.a for part in given])}
    out["lora_B.weight"] = to_theirs(layout, blocks, config)[0].contiguous()
    if lengths:
        joined = to_theirs(layout, lengths, config)[0]
        out["lora_magnitude_vector"] = joined.flatten().contiguous()
    return out


def _short_names(config: ModelConfig, targets: Sequence[str]) -> dict[str, str]:
    """The shortest end of each target's name that no other module with a matrix shares."""
    others = [
        name.removesuffix(".weight")
        for name in _table(config)
        if name.endswith(".weight") and name.removesuffix(".weight") not in targets
    ]
    out = {}
    for target in targets:
        parts = target.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        out[target] = next(
            end for end in ends if not any(f".{name}".endswith(f".{end}") for name in others)
        )
    return out


def _table(config: ModelConfig) -> dict[str, tuple[Conversion, int]]:
    """The name of each tensor of the Hugging Face model -> what it holds, and which it is of it."""
    shapes = {n: s for n, s in parameter_shapes(config).items() if not is_prompt(n)}
    found = conversions(zoo.family(config.family).weight_table(config), shapes)
    return {name: (c, index) for c in found for index, name in enumerate(c.theirs)}

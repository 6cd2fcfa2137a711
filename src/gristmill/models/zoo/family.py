"""What a family of models is: a table of weight names and two functions for `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.util.errors import UserError

Json = dict[str, Any]

# What a Hugging Face `config.json` does not say, or says with values of no consequence.
UNSAID = ("name", "family", "num_token_ids", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Weight:
    """One Hugging Face tensor and the parameters of ours that it holds; `{i}` is the layer.

    Three parameters are query, key and value in one matrix whose rows go head group by head group:
    the group's query heads, then its key head, then its value head.
    """

    theirs: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A named size: its configuration and the Hugging Face repository it comes from."""

    repo: str | None
    config: ModelConfig

    @property
    def url(self) -> str | None:
        """The page of the repository, None for a model of our own."""
        return self.repo and f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is particular to one Hugging Face architecture."""

    name: str
    """The value of `ModelConfig.family`."""
    architecture: str
    """The class in `transformers`, as in `config.json`."""
    model_type: str
    """The `model_type` in `config.json`."""
    weights: tuple[Weight, ...]
    """Names of the tensors; parameters that a configuration lacks are passed over."""
    dropped: tuple[str, ...]
    """Patterns of tensors in old files that are tables and no weights."""
    settings: Callable[[ModelConfig], Json]
    """Our configuration in the words of this family's `config.json`."""
    parse: Callable[[Json], ModelConfig]
    """The other direction; sets every field but those of `UNSAID`."""
    models: Mapping[str, Model]
    """The sizes by name."""

    def to_hf_config(self, config: ModelConfig) -> Json:
        """The `config.json` of this model, in words that transformers 4 and 5 both read.

        Raises UserError when the family has no word for a switch that the model uses: what comes
        back from these words must be the same model.
        """
        words = self.settings(config)
        lost = _differences(config, self.parse(words))
        if lost:
            raise UserError(
                f"{self.architecture} cannot express {', '.join(lost)}. "
                "Change these values: other tools could not load the model."
            )
        out: Json = {"architectures": [self.architecture], "model_type": self.model_type, **words}
        out["bos_token_id"], out["eos_token_id"] = config.bos_token_id, config.eos_token_id
        out["gristmill"] = {"name": config.name, "num_token_ids": config.num_token_ids}
        return out

    def from_hf_config(self, raw: Json) -> ModelConfig:
        """Our configuration of a `config.json`; UserError names a value that is not supported."""
        extra = raw.get("gristmill") or {}
        return replace(
            self.parse(raw),
            name=extra.get("name") or "custom",
            family=self.name,
            num_token_ids=extra.get("num_token_ids"),
            bos_token_id=_first(raw.get("bos_token_id")),
            eos_token_id=_first(raw.get("eos_token_id")),
        )

    def weight_names(self, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Hugging Face name -> our names, for the parameters that a model has."""
        ours_to_weight = {name: weight for weight in self.weights for name in weight.ours}
        table: dict[str, tuple[str, ...]] = {}
        for name in parameters:
            layer = re.search(r"\.(\d+)\.", name)
            index = layer.group(1) if layer else ""
            weight = ours_to_weight.get(name.replace(f".{index}.", ".{i}.") if layer else name)
            assert weight is not None, f"{name} has no name in the table of {self.name}"
            theirs = weight.theirs.replace("{i}", index)
            table[theirs] = tuple(ours.replace("{i}", index) for ours in weight.ours)
        return table

    def is_dropped(self, theirs: str) -> bool:
        """Whether a tensor of a file carries no weight."""
        return any(re.search(pattern, theirs) for pattern in self.dropped)


def _differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """`field=value` of `config` for every field that matters and differs in `other`."""
    out = []
    for field in fields(ModelConfig):
        if field.name in UNSAID:
            continue
        resolved = {"num_kv_heads": "kv_heads", "head_dim": "head_size"}.get(field.name, field.name)
        if getattr(config, resolved) != getattr(other, resolved):
            out.append(f"{field.name}={getattr(config, field.name)}")
    return out


def _first(ids: int | list[int] | None) -> int | None:
    """The first of several end-of-sequence ids; `generation_config.json` keeps them all."""
    return ids[0] if isinstance(ids, list) else ids


def need(raw: Json, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
    """The value of `key` in a `config.json`, which must be one of `allowed`."""
    value = raw.get(key, default)
    if value not in allowed:
        words = ", ".join(map(str, allowed))
        raise UserError(f"{key} is {value!r}. Supported: {words}.")
    return value


def required(raw: Json, key: str) -> Any:
    """The value of `key` in a `config.json`, which must be there."""
    if raw.get(key) is None:
        raise UserError(f"{key} is missing. Get the model's own config.json.")
    return raw[key]


def parse_rope(raw: Json, theta_key: str = "rope_theta") -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from either generation of `config.json`.

    transformers 5 writes one `rope_parameters`, older ones a base and `rope_scaling`.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get(theta_key) or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"rotary scaling is {kind!r}. Supported: default, llama3.")
    original = rope.get("original_max_position_embeddings") or required(
        raw, "max_position_embeddings"
    )
    return theta, RopeScaling(
        factor=float(required(rope, "factor")),
        low_freq_factor=float(required(rope, "low_freq_factor")),
        high_freq_factor=float(required(rope, "high_freq_factor")),
        original_max_seq_length=int(original),
    )


def rope_scaling_words(scaling: RopeScaling | None) -> Json | None:
    """`rope_scaling` of a `config.json`; None stands for none."""
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_length,
    }

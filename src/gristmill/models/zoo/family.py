"""What a family of models is: a table of weight names and a table of words of `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.rope_words import check_rope, parse_rope, rope_words
from gristmill.models.zoo.sizes import Model
from gristmill.models.zoo.weights import Weight
from gristmill.models.zoo.words import Json, Word, read_words, write_words
from gristmill.util.errors import UserError

# What a Hugging Face `config.json` does not say, or says with values of no consequence.
UNSAID = ("name", "family", "num_token_ids", "bos_token_id", "eos_token_id")

ROTARY_TABLES = r"\.rotary_emb\.inv_freq$"
"""What old files hold beside the weights."""

# Fields that are compared by what they come to.
RESOLVED = {
    "num_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "attention_scale": "score_scale",
    "sliding_window": "windows",
    "sliding_pattern": "windows",
    "rope_pattern": "rotates",
}


@dataclass(frozen=True)
class Adaption:
    """Where PEFT puts adaption prompts into an architecture that it has them for."""

    module: str
    """The attention of block `{i}`."""
    projected: bool = True
    """Whether what they give goes through the output projection."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is particular to one Hugging Face architecture."""

    name: str
    """The value of `ModelConfig.family`."""
    architecture: str
    """The class in `transformers`, as in `config.json`."""
    model_type: str
    """The `model_type` in `config.json`."""
    weights: tuple[Weight, ...] | Callable[[ModelConfig], tuple[Weight, ...]]
    """Names of the tensors, or what gives them where they depend on the configuration; lines that
    a model has no parameters for are passed over."""
    words: tuple[Word, ...]
    """Keys of `config.json` and the fields they set."""
    models: Mapping[str, Model]
    """The sizes by name."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the architecture implies."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` of which one value is supported; it is written, another is refused."""
    theta_key: str = "rope_theta"
    """The key of the rotary base outside of `rope_parameters`."""
    rotary: tuple[str, ...] = ()
    """Which of `rope_fraction` and `rope_local_theta` the architecture has; a file that sets the
    other is refused."""
    parse_more: Callable[[Json], Json] | None = None
    """Fields that take more than a word; wins over `words`."""
    more_words: Callable[[ModelConfig], Json] | None = None
    """The other direction."""
    also_reads: tuple[str, ...] = ()
    """Other architectures whose files hold such a model."""
    unwrap: Callable[[Json], Json] | None = None
    """The part of such files' `config.json` that describes it."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns in the names of tensors and what takes their place, for files that vary."""
    get_unquantized: str = "Get its repository of 16-bit weights."
    """What to do about weights in fewer bits than are supported."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Modules that transformers 5 calls otherwise than files do: the name in files -> in memory."""
    adaption: Adaption | None = None
    """Adaption prompts of PEFT, if it knows the architecture."""
    dropped: tuple[str, ...] = ()
    """Patterns of tensors in files that are no weights of this model, besides rotary tables;
    `{num_layers}` stands for the number of the block behind the last."""

    def to_hf_config(self, config: ModelConfig) -> Json:
        """The `config.json` of this model, in words that transformers 4 and 5 both read.

        Raises UserError when the family has no word for a switch that the model uses: what comes
        back from these words must be the same model.
        """
        words = self._write(config)
        lost = differences(config, self._parse(words))
        if lost:
            raise UserError(
                f"{self.architecture} cannot express {', '.join(lost)}. "
                "Change these values: other tools could not load the model."
            )
        out: Json = {"architectures": [self.architecture], "model_type": self.model_type, **words}
        eos = config.eos_token_id
        out["bos_token_id"] = config.bos_token_id
        out["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
        out["gristmill"] = {"name": config.name, "num_token_ids": config.num_token_ids}
        return out

    def from_hf_config(self, raw: Json) -> ModelConfig:
        """Our configuration of a `config.json`; UserError names a value that is not supported."""
        extra = raw.get("gristmill") or {}
        inner = raw if self.unwrap is None else self.unwrap(raw)
        keys = ("bos_token_id", "eos_token_id")
        # Beside a part of a model stand the ids of the whole, which may be more than its defaults.
        bos, eos = (raw[key] if raw.get(key) is not None else inner.get(key) for key in keys)
        if quantized := raw.get("quantization_config") or inner.get("quantization_config"):
            raise UserError(
                "The weights are quantised (quantization_config, "
                f"{quantized.get('quant_method', 'unknown')}), which is not supported. "
                f"{self.get_unquantized}"
            )
        return replace(
            self._parse(inner),
            name=extra.get("name") or "custom",
            family=self.name,
            num_token_ids=extra.get("num_token_ids"),
            bos_token_id=bos[0] if isinstance(bos, list) else bos,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )

    def expresses(self, config: ModelConfig) -> bool:
        """Whether `to_hf_config` has words for all of a model."""
        try:
            return not differences(config, self._parse(self._write(config)))
        except UserError:
            return False

    def weight_table(self, config: ModelConfig) -> tuple[Weight, ...]:
        """The names of the tensors of a model."""
        return self.weights(config) if callable(self.weights) else self.weights

    def rename(self, theirs: str) -> str:
        """The name in `weights` of a tensor of a file."""
        for pattern, replacement in self.renames:
            theirs = re.sub(pattern, replacement, theirs)
        return theirs

    def is_dropped(self, theirs: str, config: ModelConfig) -> bool:
        """Whether a tensor of a file carries no weight."""
        layers = str(config.num_layers)
        patterns = (p.replace("{num_layers}", layers) for p in (ROTARY_TABLES, *self.dropped))
        return any(re.search(pattern, theirs) for pattern in patterns)

    def _write(self, config: ModelConfig) -> Json:
        out = {**write_words(self.words, config), **self.constants}
        if self._has_rope:
            out |= rope_words(config, self.theta_key)
        return out | (self.more_words(config) if self.more_words else {})

    def _parse(self, raw: Json) -> ModelConfig:
        for key, value in self.constants.items():
            if raw.get(key) not in (None, value):
                raise UserError(f"{key} is {raw[key]!r}. Supported: {value}.")
        values = read_words(self.words, raw)
        if self._has_rope:
            rope = parse_rope(raw, self.theta_key)
            check_rope(rope, self.rotary)
            values |= rope
        values |= self.fixed
        values |= self.parse_more(raw) if self.parse_more else {}
        return ModelConfig(**values)

    @property
    def _has_rope(self) -> bool:
        return self.fixed.get("positions") != "learned"


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """`field=value` of `config` for every field that matters and differs in `other`."""
    out = []
    for field_ in fields(ModelConfig):
        name = field_.name
        if name in UNSAID or (name.startswith("rope_") and not any(config.rotates)):
            continue
        if name == "norm_bias" and config.norm == "rmsnorm":
            continue
        resolved = RESOLVED.get(name, name)
        if getattr(config, resolved) != getattr(other, resolved):
            out.append(f"{name}={getattr(config, name)}")
    return out

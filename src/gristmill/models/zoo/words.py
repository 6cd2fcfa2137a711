"""Words of `config.json` against fields of `ModelConfig`, as a table that reads both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gristmill.config.model import ModelConfig
from gristmill.util.errors import UserError

Json = dict[str, Any]

REQUIRED = object()
"""The default of a word that must be there."""


@dataclass(frozen=True)
class Word:
    """A key of `config.json` and the field of `ModelConfig` that it sets.

    Several fields that share one word must be equal. `default` is the architecture's where the key
    is missing; `values` turns their values into ours (of two for the same, the first is written). A
    null stands for the default too, unless the word is `nullable`: then it means none.
    """

    theirs: str
    ours: str | tuple[str, ...]
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    nullable: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def read(self, raw: Json) -> dict[str, Any]:
        """Fields and values; UserError for a missing word or a value that is not supported."""
        value = raw.get(self.theirs)
        if value is None and not (self.nullable and self.theirs in raw):
            value = self.default
        if value is REQUIRED:
            raise UserError(f"{self.theirs} is missing. Get the model's own config.json.")
        if self.values is not None:
            if value not in self.values:
                known = ", ".join(map(str, self.values))
                raise UserError(f"{self.theirs} is {value!r}. Supported: {known}.")
            value = self.values[value]
        return dict.fromkeys(self.fields, value)

    def write(self, config: Any) -> Any:
        """The value of this word for a model of ours, or for a part of one."""
        field = self.fields[0]
        value = getattr(
            config, {"num_kv_heads": "kv_heads", "head_dim": "head_size"}.get(field, field)
        )
        if self.values is None:
            return value
        return next((theirs for theirs, ours in self.values.items() if ours == value), None)


ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
    "swish": "silu",
}
"""`hidden_act` of transformers -> ours; of two names for one function the first is written."""

STANDARD = (
    Word("vocab_size", "vocab_size"),
    Word("max_position_embeddings", "max_seq_length", 2048),
    Word("hidden_size", "hidden_size"),
    Word("num_hidden_layers", "num_layers"),
    Word("num_attention_heads", "num_heads"),
    Word("num_key_value_heads", "num_kv_heads", None),
    Word("head_dim", "head_dim", None),
    Word("intermediate_size", "intermediate_size"),
    Word("hidden_act", "activation", "silu", ACTIVATIONS),
    Word("rms_norm_eps", "norm_eps", 1e-6),
    Word("tie_word_embeddings", "tie_embeddings", False),
)
"""What nearly every `config.json` says."""

ATTENTION_BIAS = Word("attention_bias", ("qkv_bias", "attention_out_bias"), False)
"""The word of many architectures for a bias on all four projections."""


def read_words(words: Iterable[Word], raw: Json) -> dict[str, Any]:
    """Fields and values of all words; UserError for one that is missing or not supported."""
    return {field: value for word in words for field, value in word.read(raw).items()}


def write_words(words: Iterable[Word], config: Any) -> Json:
    """The other direction, for a model or a part of one that has the fields."""
    return {word.theirs: word.write(config) for word in words}


def replaced(words: Iterable[Word], *new: Word) -> tuple[Word, ...]:
    """The words, with those that set the same field as one of `new` replaced, the others added."""
    taken = {field for word in new for field in word.fields}
    kept = [word for word in words if not taken & set(word.fields)]
    return (*kept, *new)


def without(words: Iterable[Word], *fields: str) -> tuple[Word, ...]:
    """The words but those that set one of `fields`."""
    return tuple(word for word in words if not set(fields) & set(word.fields))


def require(raw: Json, key: str) -> Any:
    """The value of `key`, which must be there."""
    if raw.get(key) is None:
        raise UserError(f"{key} is missing. Get the model's own config.json.")
    return raw[key]


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` of transformers: whether each block has the sliding window."""
    return ["full_attention" if w is None else "sliding_attention" for w in config.windows]


def parse_layer_types(raw: Json, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """The pattern of sliding windows in `layer_types`, or `default` where there is none."""
    kinds = raw.get("layer_types")
    if not kinds:
        return default
    known = {"sliding_attention": True, "full_attention": False}
    strange = sorted(set(kinds) - set(known))
    if strange:
        raise UserError(f"layer_types has {strange[0]!r}. Supported: {', '.join(known)}.")
    return shortest(tuple(known[kind] for kind in kinds))


def shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest pattern whose repetition begins like `pattern`."""
    for length in range(1, len(pattern)):
        if all(value == pattern[i % length] for i, value in enumerate(pattern)):
            return pattern[:length]
    return pattern

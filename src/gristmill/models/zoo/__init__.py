"""Every family of models as data, without torch: names, shapes, weight names, `config.json`."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from gristmill.config.model import (
    AdaptionPrompt,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    RopeScaling,
)
from gristmill.models.zoo import (
    deepseek_v2,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    nanochat,
    olmo,
    olmo2,
    olmo3,
    phi,
    phi3,
    pythia,
    qwen2,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import Model
from gristmill.util.errors import UserError

# A model that several families can express belongs to the first of them.
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        llama,
        mistral,
        mixtral,
        qwen2,
        qwen3,
        qwen3_moe,
        smollm3,
        seed_oss,
        pythia,
        stablelm,
        falcon,
        gpt2,
        olmo,
        olmo2,
        olmo3,
        nanochat,
        starcoder2,
        gemma,
        gemma2,
        gemma3,
        phi,
        phi3,
        deepseek_v2,
        deepseek_v3,
    )
}

SENTENCEPIECE_CLASS = "LlamaTokenizer"
"""The class of `transformers` that reads any SentencePiece `tokenizer.model` as it is meant."""


def models() -> dict[str, Model]:
    """Every named model, in the order of its name (capitals first)."""
    found = {name: model for f in FAMILIES.values() for name, model in f.models.items()}
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return list(models())


def repositories() -> list[str]:
    """The Hugging Face repositories of the named models, sorted without regard to case."""
    return sorted({m.repo for m in models().values() if m.repo is not None}, key=str.lower)


def get(name: str) -> ModelConfig:
    """The configuration of a named model.

    `name` is one of `names()`, a Hugging Face repository, or its last part, in any case. Raises
    UserError with the nearest names for another one.
    """
    wanted = name.strip().lower()
    spellings = _spellings()
    if wanted in spellings:
        return models()[spellings[wanted]].config
    near = difflib.get_close_matches(wanted.rpartition("/")[2], spellings, n=12, cutoff=0.5)
    nearest = list(dict.fromkeys(spellings[key] for key in near))[:3]
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    raise UserError(f"Unknown model {name!r}. {hint}List the models: gristmill pretrain list")


def _spellings() -> dict[str, str]:
    """Lower-case spelling -> name. A name wins over the end of another model's repository."""
    out: dict[str, str] = {}
    for name, model in models().items():
        if model.repo is not None:
            out[model.repo.lower()] = name
            out.setdefault(model.repo.rpartition("/")[2].lower(), name)
    return out | {name.lower(): name for name in names()}


def family(name: str) -> Family:
    """The table that `ModelConfig.family` names."""
    if name not in FAMILIES:
        raise UserError(f"Unknown model family {name!r}. Families: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_of(raw: dict[str, Any]) -> Family:
    """The family of a Hugging Face `config.json`; UserError names what is supported."""
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    for candidate in FAMILIES.values():
        if {candidate.architecture, *candidate.also_reads} & set(architectures):
            return candidate
        if not architectures and candidate.model_type == kind:
            return candidate
    found = architectures[0] if architectures else kind
    supported = ", ".join(f.architecture for f in FAMILIES.values())
    raise UserError(f"Architecture {found!r} is not supported. Supported: {supported}.")


def family_for(config: ModelConfig) -> ModelConfig:
    """The same model in the first family whose `config.json` can express it.

    For a configuration that comes from a format without families. Raises UserError when none can.
    """
    for candidate in FAMILIES.values():
        if candidate.expresses(config):
            return replace(config, family=candidate.name)
    raise UserError(
        f"No architecture has all the switches of {config.name}. Supported: "
        f"{', '.join(f.architecture for f in FAMILIES.values())}."
    )


def with_family(config: ModelConfig) -> ModelConfig:
    """The same model in a family that can express it: its own, or the first; else as it is."""
    if family(config.family).expresses(config):
        return config
    try:
        return family_for(config)
    except UserError:
        return config


def config_from_dict(raw: dict[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` of a `ModelConfig`; UserError names an unknown key."""
    parts: dict[str, Any] = {
        "rope_scaling": RopeScaling,
        "moe": MixtureOfExperts,
        "latent_attention": LatentAttention,
        "adaption_prompt": AdaptionPrompt,
    }
    made = {key: _made(kind, raw[key]) for key, kind in parts.items() if raw.get(key)}
    config: ModelConfig = _made(ModelConfig, raw | made)
    return config


def _made(kind: Any, raw: dict[str, Any]) -> Any:
    """A configuration of its fields in JSON, which has lists for tuples."""
    unknown = sorted(set(raw) - {field.name for field in fields(kind)})
    if unknown:
        raise UserError(
            f"The model configuration has unknown settings ({', '.join(unknown)}). "
            "Update gristmill: a newer version wrote it."
        )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})

"""Named sizes of a family: one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gristmill.config.model import ModelConfig

Fields = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A named size: its configuration and the Hugging Face repository it comes from."""

    repo: str | None
    config: ModelConfig

    @property
    def url(self) -> str | None:
        """The page of the repository, None for a model of our own."""
        return self.repo and f"https://huggingface.co/{self.repo}"


@dataclass(frozen=True)
class Size:
    """A name, a repository (None: ours) and the fields that make the model."""

    name: str
    repo: str | None
    fields: Fields


def size(name: str, repo: str | None, *parts: Fields, **fields: Any) -> Size:
    """A named model; later parts win, `fields` win over all. `repo` "ORG/" stands for ORG/NAME."""
    full = f"{repo}{name}" if repo is not None and repo.endswith("/") else repo
    return Size(name, full, {k: v for part in (*parts, fields) for k, v in part.items()})


def table(family: str, *sizes: Size) -> dict[str, Model]:
    """Name -> model of a family."""
    return {
        s.name: Model(s.repo, ModelConfig(name=s.name, family=family, **s.fields)) for s in sizes
    }


def shape(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> Fields:
    """The five numbers that make a size."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": inner,
    }

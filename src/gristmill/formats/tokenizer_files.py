"""The tokenizer of a model, wherever it lies: with the weights, beside them, or within."""

from __future__ import annotations

from pathlib import Path

from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.source import ModelDir
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError


def find_tokenizer(source: ModelDir) -> Tokenizer | None:
    """The tokenizer of a model that was found; None where it has none.

    Raises UserError for one that is there and cannot be read.
    """
    for place in _places(source):
        try:
            return Tokenizer.load(place)
        except UserError as error:
            if "no tokenizer at" not in str(error):
                raise
    return None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the model at `path`. Raises UserError when there is none."""
    source = open_model_dir(path)
    return find_tokenizer(source) or Tokenizer.load(_places(source)[0])


def _places(source: ModelDir) -> list[Path]:
    if source.kind == "gguf":  # within
        return [source.path]
    if source.base is not None:  # an adapter's own, or else its base's
        return [source.path, *_places(source.base)]
    tensors = source.open_tensors()
    weights = tensors.file_of(next(iter(tensors)))
    return [place for place in (source.path, weights.parent) if place.is_dir()]

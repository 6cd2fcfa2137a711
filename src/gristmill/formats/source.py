"""Models in files: tensors read when asked for, under their names or under ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gristmill.config.model import ModelConfig
from gristmill.formats.layouts import to_ours, to_theirs
from gristmill.models.counts import Shapes, parameter_shapes, stays_fp32
from gristmill.models.zoo.weights import Conversion, Weight, conversions
from gristmill.util.errors import UserError

AGAIN = "Fetch or copy it again."
Kind = Literal["checkpoint", "huggingface", "litgpt", "gguf", "peft"]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: where it is, its shape as stored, and how to read it."""

    file: Path
    read: Callable[[], Tensor]


class Tensors(Mapping[str, Tensor]):
    """The tensors of files by name, on the CPU, each read anew when it is asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # a mapping's own way is to read it

    def file_of(self, name: str) -> Path:
        """The (first) file that holds a tensor."""
        return self.entries[name].file

    def renamed(self, rename: Callable[[str], str]) -> Tensors:
        """The same tensors under other names."""
        return Tensors({rename(name): entry for name, entry in self.entries.items()})


def _never(name: str) -> bool:
    return False


@dataclass(frozen=True)
class ModelDir:
    """A model that was found: its configuration, and how its weights lie in which files."""

    path: Path
    config: ModelConfig
    kind: Kind
    open_tensors: Callable[[], Tensors]
    """Reads the headers of the files. Raises UserError when one is missing or damaged."""
    weights: tuple[Weight, ...] | None = None
    """The table of names; None where the names are ours."""
    is_dropped: Callable[[str], bool] = _never
    """Whether a tensor that the table does not name carries no weight."""
    base: ModelDir | None = None
    """The model that an adapter at `path` changes."""

    def conversions(self) -> list[Conversion]:
        """Which tensors hold which parameters."""
        shapes = parameter_shapes(self.config)
        if self.weights is None:
            return [Conversion((name,), (name,)) for name in shapes]
        return conversions(self.weights, shapes)

    def tensors(self) -> Tensors:
        """All tensors of the files. Raises UserError when one that the model needs is missing,
        or one is there that the model has no place for."""
        found = self.open_tensors()
        wanted = {name for c in self.conversions() for name in c.theirs}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(wanted)} tensors are missing, the first is "
                f"{min(missing)}. {AGAIN}"
            )
        for name in found:
            if name not in wanted and not self._may_stay(name):
                raise UserError(
                    f"{found.file_of(name)}: tensor {name} has no place in the model that its "
                    "configuration describes. Use the configuration that belongs to these weights."
                )
        return found

    def parameters(self) -> Parameters:
        """Our names -> full tensors, for those who write the model elsewhere."""
        return Parameters(self)

    def _may_stay(self, name: str) -> bool:
        """Whether a tensor that is not needed does no harm: tables, the head of a tied model."""
        tied_head = self.config.tie_embeddings and any(
            name == w.theirs for w in self.weights or () if w.ours == ("head.weight",)
        )
        return tied_head or self.is_dropped(name)


class Parameters(Mapping[str, Tensor]):
    """The parameters of a model in files, by our names, each read and converted when asked for.

    What was read last is kept: several parameters may lie in one tensor. A tensor of a wrong shape
    is a UserError that names it and its file.
    """

    def __init__(self, source: ModelDir) -> None:
        self.config = source.config
        self.shapes: Shapes = parameter_shapes(source.config)
        self.files = source.tensors()
        self._by_name = {name: c for c in source.conversions() for name in c.ours}
        self._last: tuple[Conversion | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        conversion = self._by_name[name]
        if self._last[0] != conversion:
            self._last = (None, {})
            self._last = (conversion, dict(zip(conversion.ours, self._read(conversion))))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def _read(self, conversion: Conversion) -> list[Tensor]:
        shapes = [self.shapes[name] for name in conversion.ours]
        tensors = []
        for name, expected in zip(conversion.theirs, their_shapes(conversion, shapes, self.config)):
            tensor = self.files[name]
            if tuple(tensor.shape) != expected:
                raise UserError(
                    f"{self.files.file_of(name)}: tensor {name} is {list(tensor.shape)}, but the "
                    f"configuration makes it {list(expected)}. Use the configuration that belongs "
                    "to these weights."
                )
            tensors.append(tensor)
        return to_ours(conversion.layout, tensors, self.config, shapes)


class TheirTensors(Mapping[str, Tensor]):
    """Parameters under the names and in the layouts of a file, converted when asked for.

    The names come in the order in which asking costs least: what was converted last is kept.
    """

    def __init__(
        self, weights: Sequence[Weight], config: ModelConfig, parameters: Mapping[str, Tensor]
    ) -> None:
        self.config, self.parameters = config, parameters
        ours = parameter_shapes(config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.wide: set[str] = set()
        """Names of tensors that are fp32 in every file."""
        self._by_name: dict[str, Conversion] = {}
        for conversion in conversions(weights, ours):
            if any(map(stays_fp32, conversion.ours)):
                self.wide |= set(conversion.theirs)
            shapes = their_shapes(conversion, [ours[name] for name in conversion.ours], config)
            self.shapes |= dict(zip(conversion.theirs, shapes))
            self._by_name |= dict.fromkeys(conversion.theirs, conversion)
        self._last: tuple[Conversion | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        conversion = self._by_name[name]
        if self._last[0] != conversion:
            self._last = (None, {})
            tensors = [self.parameters[ours] for ours in conversion.ours]
            joined = to_theirs(conversion.layout, tensors, self.config)
            self._last = (conversion, dict(zip(conversion.theirs, joined, strict=True)))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def their_shapes(
    conversion: Conversion, shapes: Sequence[tuple[int, ...]], config: ModelConfig
) -> list[tuple[int, ...]]:
    """Shapes of the tensors that hold parameters of `shapes`: those of a conversion of nothing."""
    ours = [torch.empty(shape, device="meta") for shape in shapes]
    return [tuple(t.shape) for t in to_theirs(conversion.layout, ours, config)]

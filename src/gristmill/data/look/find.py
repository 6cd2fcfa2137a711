"""Which datasets a path means: itself, or those in the folders below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from gristmill.data import manifest
from gristmill.data.dataset import Dataset
from gristmill.data.workspace import NAME as UNFINISHED
from gristmill.util.errors import UserError

# OUT/<set>/<split>, and a folder above them.
_DEEPEST = 3


def below(paths: Sequence[str]) -> list[Path]:
    """The datasets that the paths name, training before validation.

    Raises UserError for a path without one, saying what is there instead.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        here = list(_search(path, 0))
        if not here:
            Dataset.open(path)  # says what is wrong with it
        found += [folder for folder in here if folder not in found]
    return found


def train_of(path: str) -> Path:
    """The dataset a training would read: the path's own, or its folder `train`.

    Raises UserError when the path holds several others.
    """
    folder = Path(path).expanduser()
    if is_dataset(folder) or not folder.is_dir():
        return folder
    found = list(_search(folder, 0))
    if is_dataset(folder / "train"):
        return folder / "train"
    if len(found) > 1:
        names = ", ".join(str(inside) for inside in found)
        raise UserError(f"{folder} holds {len(found)} datasets. name one of them: {names}.")
    return found[0] if found else folder


def is_dataset(folder: Path) -> bool:
    """Whether there is a finished dataset, or one of litdata's."""
    if (folder / manifest.NAME).is_file():
        return True
    return (folder / "index.json").is_file() and not (folder / UNFINISHED).exists()


def is_validation(dataset: Dataset) -> bool:
    """Whether this is the held-out side of a split, which no training reads."""
    source = dataset.manifest.source
    if source is not None and source.split:
        return source.split == "val"
    return PurePath(dataset.path).name in ("val", "validation", "test")


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if is_dataset(folder):
        yield folder
    elif depth < _DEEPEST and folder.is_dir():
        inside = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        # A folder of many other things is not searched for long: train before val is by name.
        for path in sorted(inside):
            yield from _search(path, depth + 1)

"""Which datasets a path or URL means: itself, or those in the folders below it; opening them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from gristmill.data.preparation.workspace import is_unfinished
from gristmill.data.reading.chunk_cache import ChunkCache
from gristmill.data.storage import Storage, is_url
from gristmill.data.store import manifest
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

# OUT/<set>/<split>, and a folder above them.
_DEEPEST = 3

# Chunks of an object store that lie on this machine while they are looked at.
_CACHE_BYTES = 4 << 30

Open = Callable[[str | Path], Dataset]


@contextlib.contextmanager
def opening() -> Iterator[Open]:
    """A function that opens datasets, those of object stores too, until the block ends."""
    with contextlib.ExitStack() as until:
        caches: list[ChunkCache] = []

        def open_dataset(path: str | Path) -> Dataset:
            if not is_url(path):
                return Dataset.open(path)
            if not caches:
                folder = until.enter_context(tempfile.TemporaryDirectory(prefix="gristmill-"))
                # One batch is looked at: nothing that comes after it is fetched.
                caches.append(ChunkCache(Path(folder), _CACHE_BYTES, ahead_bytes=1))
                until.callback(caches[0].close)
            return Dataset.open(path, cache=caches[0])

        yield open_dataset


def below(paths: Sequence[str]) -> list[str | Path]:
    """The datasets that the paths name, training before validation.

    Raises UserError for a path without one, saying what is there instead.
    """
    found: list[str | Path] = []
    for given in paths:
        here = _at(given) or [given if is_url(given) else Path(given).expanduser()]
        # Opening one that is not there says what is wrong with it.
        found += [place for place in here if place not in found]
    return found


def train_of(path: str) -> str | Path:
    """The dataset a training would read: the path's own, or its folder `train`.

    Raises UserError when the path holds several others.
    """
    found = _at(path)
    if not found:
        return path if is_url(path) else Path(path).expanduser()
    train = [place for place in found if str(place) == Storage(path).at("train")]
    if len(found) > 1 and not train:
        names = ", ".join(map(str, found))
        raise UserError(f"{path} holds {len(found)} datasets. name one of them: {names}.")
    return (train or found)[0]


def _at(path: str) -> list[str | Path]:
    """The datasets at a path or URL, and below it."""
    if not is_url(path):
        return list(_search(Path(path).expanduser(), 0))
    storage = Storage(path)
    try:
        if storage.exists(manifest.NAME):
            return [storage.root]
        names = [entry.name for entry in storage.list()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). check the URL, and the credentials of its store."
        ) from error
    suffix = f"/{manifest.NAME}"
    return [storage.at(name.removesuffix(suffix)) for name in names if name.endswith(suffix)]


def is_dataset(folder: Path) -> bool:
    """Whether there is a finished dataset, or one of litdata's."""
    if (folder / manifest.NAME).is_file():
        return True
    return (folder / "index.json").is_file() and not is_unfinished(folder)


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

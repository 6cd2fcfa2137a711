"""The small world, made once; every test copies what it changes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import small
import tutorial_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `novels/`, `tokenizer/` and a finished run in `run/`."""
    root = tmp_path_factory.mktemp("world")
    small.write_novels(root / "novels")
    small.train_tokenizer(root / "novels", root / "tokenizer")
    assert small.main(small.pretrain(root, root / "run")) == 0
    return root


@pytest.fixture
def own_run(world: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads; tests compare runs of one number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tutorials(tmp_path_factory: pytest.TempPathFactory) -> tutorial_world.Tutorials:
    """The files of a hub on this machine, for the tutorials of other tools."""
    return tutorial_world.make(tmp_path_factory.mktemp("tutorials"))


@pytest.fixture
def place(
    tutorials: tutorial_world.Tutorials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty working directory with that hub, and tiny models under the real names."""
    with tutorial_world.at(tmp_path, tutorials, monkeypatch) as here:
        yield here

"""The small world, made once; every test copies what it changes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import small


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

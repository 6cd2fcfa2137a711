"""What every test may count on: no network, untouched user caches, `shared` inputs or a skip."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before anything of the package, or a tool it uses, is imported."""
    config.cache_home = tempfile.mkdtemp(prefix="gristmill-tests-")
    os.environ["XDG_CACHE_HOME"] = config.cache_home
    os.environ["XDG_STATE_HOME"] = config.cache_home
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A shell starts background jobs with Ctrl-C ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.cache_home, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is asked only when such a test is there."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory of larger real inputs, no part of the project; skips where it is absent."""
    path = Path(os.environ.get("GRISTMILL_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip("no shared inputs (set GRISTMILL_SHARED)")
    return path


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse connections to other machines, so that a test that needs one fails everywhere."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"  # a str: a local socket
        if host not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
            raise OSError(f"tests do not use the network ({address})")
        connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> None:
    """Slow tests that compile count no recompilations of those before them in this process."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None and request.node.get_closest_marker("slow"):
        compiler.reset()

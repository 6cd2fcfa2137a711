"""An S3-compatible server on this machine, for tests of object stores."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from gristmill.data.storage import Storage

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its address; the environment of this process and its children names it."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # one line for each request
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield address
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> str:
    """The URL of a new, empty bucket."""
    import s3fs

    name = f"tests-{next(_numbers)}"
    s3fs.S3FileSystem(endpoint_url=s3_server).mkdir(name)
    return f"s3://{name}"


def upload(folder: Path, url: str) -> str:
    """Copy a folder's files to a URL; the URL."""
    store = Storage(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


def stored(url: str) -> dict[str, bytes]:
    """Every object below a URL and its bytes, without the note of when inputs were changed."""
    store = Storage(url)
    names = [entry.name for entry in store.list()]
    return {name: store.read(name) for name in names if name != ".job.json"}

"""A server in this process, on a free port, with a tiny random model."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.config.serve import Serve
from gristmill.infer.load import load
from gristmill.infer.serve import command, server
from gristmill.infer.serve.app import Service, build_app

from ..conftest import TEMPLATE, make_model

KEY = "a-key-of-tests"
LIVE: set[Any] = set()


class Slow:
    """A batch each of whose steps takes a while, and fails when told so."""

    def __init__(self, batch: Any, step_s: float) -> None:
        self.batch, self.step_s = batch, step_s
        self.failure: BaseException | None = None
        self.read_from: list[int] = []

    def read(self, row, ids, *, held, part_tokens):
        self.read_from.append(held)
        for logits in self.batch.read(row, ids, held=held, part_tokens=part_tokens):
            self._fail()
            yield logits

    def step(self, rows, tokens):
        time.sleep(self.step_s)
        self._fail()
        return self.batch.step(rows, tokens)

    def drop(self, row):
        self.batch.drop(row)

    def kept(self, row, count):
        return self.batch.kept(row, count)

    def _fail(self):
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


class Running:
    """A server under way: `url`, its `service`, and `ask` to post JSON to it."""

    def __init__(self, url: str, service: Service, web: Any, slow: list[Slow]) -> None:
        self.url, self.service, self.web, self._slow = url, service, web, slow

    @property
    def rows(self) -> Slow:
        return self._slow[0]

    def ask(self, path: str, body: Any = None, *, key: str | None = None, **headers: str):
        """(status, answer) of a request; a body makes it a POST."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        given = {} if data is None else {"Content-Type": "application/json"}
        if key:
            given["Authorization"] = f"Bearer {key}"
        given.update({name.replace("_", "-"): value for name, value in headers.items()})
        request = urllib.request.Request(self.url + path, data, given)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def settle(self) -> None:
        """Wait until every request that was answered has its line."""
        end = time.monotonic() + 5
        while self.web.server_state.tasks and time.monotonic() < end:
            time.sleep(0.005)

    def idle(self, timeout_s: float = 10.0) -> bool:
        """Whether nothing is written or waits, soon."""
        engine, end = self.service.engine, time.monotonic() + timeout_s
        while time.monotonic() < end:
            if not engine.num_active and not engine.num_waiting:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny step shared by threads takes longer, on a busy machine much longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_lines() -> Iterator[None]:
    """The line about a request is written in the test that asked, and nowhere between tests."""
    yield
    for running in LIVE:
        running.settle()


@contextmanager
def serving(path: Path, *, step_s: float = 0.0, key: str | None = None, **settings: Any):
    """A server of a model directory; `settings` are those of `Serve`."""
    cfg = Serve(checkpoint_dir=str(path), port=0, **settings)
    loaded = load(path, "cpu", "32-true")
    service = command.build_service(cfg, loaded, key)
    slow: list[Slow] = []
    make_rows = service.engine._make_rows

    def slowed():
        slow.append(Slow(make_rows(), step_s))
        return slow[0]

    service.engine._make_rows = slowed
    service.engine.start()
    ready = threading.Event()
    with server.bind(cfg.host, cfg.port) as listener:
        web = server.build_server(
            build_app(service), service.engine, grace_s=5, max_connections=256, ready=ready.set
        )
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        running = Running(server.url(listener), service, web, slow)
        try:
            assert ready.wait(10)
            LIVE.add(running)
            yield running
        finally:
            LIVE.discard(running)
            web.should_exit = True
            thread.join(20)
            service.engine.stop()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and room for long replies."""
    return make_model(tmp_path_factory.mktemp("long"), template=TEMPLATE, context=512)


@pytest.fixture(scope="module")
def chatty(chat_model: Path) -> Iterator[Running]:
    """A quick server without a key."""
    with serving(chat_model, model_name="tiny") as running:
        yield running


@pytest.fixture
def slow_server(long_model: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers whose steps take 10 ms, of 2 rows and 2 places to wait."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Running:
            given = {"batch_size": 2, "queue_size": 2, "step_s": 0.01, **settings}
            return stack.enter_context(serving(long_model, model_name="tiny", **given))

        yield start

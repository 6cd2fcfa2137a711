"""Listening: the socket, the web server in front of the application, and how both end."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from gristmill.infer.load import note
from gristmill.infer.serve.app import ASGIApp
from gristmill.infer.serve.engine import Engine
from gristmill.util.errors import UserError

STILL_S = 30.0
"""How long a client may take to ask for something, or to read some of what it is sent."""

MORE_CONNECTIONS = 128
"""How many are told that there are too many; those beyond are cut off without a word."""

Stillness = tuple[Any, int, float]

SETTINGS: dict[str, Any] = {
    # One line about each request is written by the application.
    "log_config": None,
    "log_level": "critical",
    "access_log": False,
    "server_header": False,
    # The addresses of clients are not used, so nobody needs to be believed about them.
    "proxy_headers": False,
    "lifespan": "off",
    "ws": "none",
}
"""What uvicorn is told in any case."""


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address, not yet listening; raises UserError when it is not to be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is no port. give 1 to 65535, or 0 for a free one.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host!r} is no address of this machine ({error}). give 127.0.0.1, or 0.0.0.0 "
            "for all its addresses."
        ) from None
    # `localhost` is both; clients that know only one know the older.
    family, kind, proto, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from None
    return listener


def _unusable(host: str, port: int, error: OSError) -> UserError:
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        other = 8000 if port < 1024 else min(port + 1, 65535)
        return UserError(
            f"port {port} of {host} cannot be listened on ({reason}). choose another with --port; "
            "0 takes a free one.",
            {"--port": other},
        )
    return UserError(
        f"--host {host} cannot be listened on ({reason}). give 127.0.0.1, or 0.0.0.0 for all "
        "addresses of this machine."
    )


def url(listener: socket.socket) -> str:
    """The address as people type it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end_still(connections: Iterable[Any], since: dict[Any, Stillness]) -> dict[Any, Stillness]:
    """Close connections whose clients have not moved for long; where those are that may, and when.

    Each that is not the server's to go on with is returned with its request, the bytes that its
    client has not read, and since when these are the same.
    """
    now = time.monotonic()
    still: dict[Any, Stillness] = {}
    for connection in connections:
        unread, cycle = connection.transport.get_write_buffer_size(), connection.cycle
        if not unread and cycle is not None and not cycle.response_complete:
            continue
        before = since.get(connection)
        start = before[2] if before is not None and before[:2] == (cycle, unread) else now
        still[connection] = cycle, unread, start
        if now - start > STILL_S:
            connection.transport.abort()
    return still


def _protocol(most: int) -> type[asyncio.Protocol]:
    """What reads and writes a connection, of which there are at most so many."""
    # The one that uvicorn always has, whatever else is installed.
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()

    return Protocol


def build_server(
    app: ASGIApp,
    engine: Engine,
    *,
    grace_s: float,
    max_connections: int,
    ready: Callable[[], None],
) -> Any:
    """The web server: `run(sockets=[...])` serves until SIGINT or SIGTERM.

    The first signal takes nothing new in, gives up what waits, and leaves replies under way
    `grace_s` seconds; the second, which `forced_by` then names, ends at once. `ready` is called
    once clients can connect. Raises ImportError where uvicorn is not installed.
    """
    import uvicorn

    class Server(uvicorn.Server):
        forced_by: int | None = None
        still: dict[Any, Stillness] = {}

        async def on_tick(self, counter: int) -> bool:
            if counter % 10 == 0:
                # uvicorn waits for ever for a request that never becomes whole, and for a reader.
                self.still = _end_still(self.server_state.connections, self.still)
            return await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Without uvicorn's own: it would raise the signal again after a graceful end.
            if self.should_exit:
                self.force_exit, self.forced_by = True, sig
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            engine.drain()
            if engine.num_active:
                note(
                    f"Stopping: replies under way ({engine.num_active}) have {grace_s:g} s to end; "
                    "Ctrl-C again ends at once."
                )
            loop = asyncio.get_running_loop()
            late = loop.call_later(grace_s, lambda: loop.run_in_executor(None, engine.stop))
            await super().shutdown(sockets)
            late.cancel()

    # A little longer than the engine takes to say goodbye.
    patience = int(grace_s) + 5
    return Server(
        uvicorn.Config(
            app,
            http=_protocol(max_connections + MORE_CONNECTIONS),
            limit_concurrency=max_connections,
            timeout_graceful_shutdown=patience,
            **SETTINGS,
        )
    )

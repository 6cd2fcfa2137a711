"""The paths of the API: who may ask, what is read of a request, and how it is answered."""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions in functions.
import asyncio
import contextlib
import hmac
import ipaddress
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gristmill.infer.load import note
from gristmill.infer.serve.engine import Closing, Engine, Full, Gone, ModelFailed, Ticket
from gristmill.infer.serve.fields import Refused
from gristmill.infer.serve.replies import Answer, Json, as_event, error_body, model_body
from gristmill.infer.serve.requests import Reader, Wanted
from gristmill.util.errors import UserError

BODY_S = 30.0
"""How long a client may take to send a request."""

QUIET_S = 10.0
"""How often a stream without news says that it is alive."""

LARGE_BYTES = 16_384
"""Requests from here on are read on another thread, so that streams go on meanwhile."""

IGNORED_BYTES = 64_000_000
"""How much of a request that is too large is read and thrown away: the client hears us after it."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Service:
    """What is served, by whom, to whom.

    `host` is the name listened on: without a key, only clients that call the server by it, or by a
    name of this machine, are answered (a page in a browser could call it by a name of its own).
    """

    model: str
    engine: Engine
    reader: Reader
    host: str
    max_request_bytes: int
    api_key: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    def described(self) -> Json:
        """What /v1/models says."""
        return model_body(self.model, self.created, self.reader.limits.max_length)


@dataclass
class Account:
    """What became of one HTTP request."""

    status: int = 0
    ticket: Ticket | None = None
    answer: Answer | None = None


def build_app(service: Service) -> ASGIApp:
    """The web application of a service. Raises ImportError where FastAPI is not installed."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    # Pages that show the API load scripts from elsewhere: there are none.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    reading = asyncio.Semaphore(2)

    async def health() -> Response:
        engine = service.engine
        if not engine.is_alive:
            raise _closing(engine)
        state = {"status": "ok", "active": engine.num_active, "waiting": engine.num_waiting}
        return JSONResponse(state)

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.described()]})

    async def model(name: str) -> Response:
        service.reader.check_model(name)
        return JSONResponse(service.described())

    async def answer(request: Request, read: Callable[[bytes], Wanted]) -> Response:
        body = await _read_body(request, service.max_request_bytes)
        wanted = await _read(read, body, reading)
        said = Answer(wanted, service.model)
        account = request.scope["account"]
        account.answer, account.ticket = said, _submit(service.engine, wanted)
        if wanted.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            events = _events(service.engine, account.ticket, said)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        await _collect(request.receive, service.engine, account.ticket, said)
        return Response(orjson.dumps(said.whole()), media_type="application/json")

    async def completions(request: Request) -> Response:
        return await answer(request, service.reader.completion)

    async def chats(request: Request) -> Response:
        return await answer(request, service.reader.chat)

    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", chats, methods=["POST"])
    _answer_errors(app)
    return _Guard(app, service)


def _answer_errors(app: Any) -> None:
    """Have whatever a route raises be told in the API's JSON."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse(error_body(error), error.status, error.headers)

    async def nowhere(request: Request, error: Any) -> Response:
        said = _no_such_path(request.method, request.url.path, error.status_code)
        return JSONResponse(error_body(said), said.status, error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        # It is raised on after this answer, and `_Guard` writes it to the log.
        said = _failure()
        return JSONResponse(error_body(said), said.status)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(404, nowhere)
    app.add_exception_handler(405, nowhere)
    app.add_exception_handler(Exception, failed)


def _failure() -> Refused:
    return Refused("the server failed. its log says how.", status=500)


def _no_such_path(method: str, path: str, status: int) -> Refused:
    paths = "GET /health, GET /v1/models, POST /v1/completions, POST /v1/chat/completions"
    return Refused(
        f"there is no {method} {path[:100]} here. what there is: {paths}.", status=status
    )


class _Guard:
    """Lets in who may ask, ends what nobody waits for, and writes a line about each request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        account = scope["account"] = Account()
        start = time.monotonic()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
            await send(message)

        try:
            _check_caller(scope, self._service)
            await self._app(scope, receive, counted)
        except Refused as error:
            await _send_error(error, counted)
        except Gone:
            account.status = 499
        except Exception:
            note(traceback.format_exc().rstrip())
            if not account.status:
                await _send_error(_failure(), send)
            account.status = 500
        finally:
            if account.ticket is not None:
                if not account.ticket.is_over and account.ticket.failure is None:
                    account.status = 499
                account.ticket.cancel()
            _write_line(scope, account, time.monotonic() - start)


def _check_caller(scope: Message, service: Service) -> None:
    """Raise Refused unless the request may be answered."""
    headers = dict(scope["headers"])
    if service.api_key is None:
        name = _host_name(headers.get(b"host", b"localhost").decode("latin-1"))
        if name != service.host.lower() and not is_this_machine(name):
            raise Refused(
                f"this server does not answer to the name {name[:100]!r}. call it by "
                f"{service.host}, or start it with an --api_key.",
                status=403,
            )
    elif scope["path"] != "/health":
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(key.strip(), service.api_key.encode())
        if scheme.lower() != b"bearer" or not right:
            raise Refused(
                "the API key is missing or wrong. send the header `Authorization: Bearer KEY`.",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def is_this_machine(name: str) -> bool:
    """Whether a host's name or address can only mean the machine that says it."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


async def _read_body(request: Any, limit: int) -> bytes:
    """The request's body; raises Refused when it is no JSON, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(
            f"the request must be JSON (content-type {kind[:100] or 'missing'}). send the header "
            "`Content-Type: application/json`.",
            status=415,
        )
    length = request.headers.get("content-length", "")
    body, size = bytearray(), 0
    # A client that asks first whether it may send so much need not.
    asks_first = "expect" in request.headers
    if length.isdigit() and int(length) > (limit if asks_first else max(limit, IGNORED_BYTES)):
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_S):
            more = True
            while more and size <= max(limit, IGNORED_BYTES):
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
                if size > limit:
                    body.clear()
                else:
                    body += message.get("body", b"")
    except TimeoutError:
        raise Refused(f"the request did not come within {BODY_S:g} s.", status=408) from None
    if size > limit:
        raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> Refused:
    return Refused(f"the request is too large (at most {limit:,} bytes).", status=413)


async def _read(read: Callable[[bytes], Wanted], body: bytes, turns: asyncio.Semaphore) -> Wanted:
    try:
        if len(body) < LARGE_BYTES:
            return read(body)
        async with turns:
            return await asyncio.to_thread(read, body)
    except UserError as error:
        raise Refused(str(error)) from None


def _submit(engine: Engine, wanted: Wanted) -> Ticket:
    try:
        return engine.submit(wanted.asks)
    except Full:
        raise Refused(
            f"too many requests ({engine.num_waiting} replies wait, at most {engine.queue_size}). "
            "try again in a moment.",
            status=429,
            code="queue_full",
            headers={"retry-after": "1"},
        ) from None
    except Closing:
        raise _closing(engine) from None


def _closing(engine: Engine) -> Refused:
    said = "the server is being stopped."
    if engine.has_failed:
        said = "the engine has failed, its log says how. restart the server."
    return Refused(said, status=503, headers={"retry-after": "5"})


async def _collect(receive: Receive, engine: Engine, ticket: Ticket, answer: Answer) -> None:
    """Wait until all replies have ended, or raise Gone as soon as the client leaves."""
    watch = asyncio.create_task(_until_gone(receive))
    watch.add_done_callback(lambda _: ticket.cancel())
    try:
        while ticket.has_left:
            answer.add(*await ticket.next())
    except Closing:
        raise _closing(engine) from None
    except ModelFailed as error:
        raise Refused(str(error), status=500) from None
    finally:
        watch.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(engine: Engine, ticket: Ticket, answer: Answer) -> AsyncIterator[bytes]:
    """The events of a stream, with a remark now and then while there is nothing to say."""
    for event in answer.beginning():
        yield event
    try:
        while ticket.has_left:
            try:
                async with asyncio.timeout(QUIET_S):
                    item = await ticket.next()
            except TimeoutError:
                yield b": waiting\n\n"
                continue
            yield answer.event(*item)
    except Closing:
        yield as_event(error_body(_closing(engine)))
    except ModelFailed as error:
        yield as_event(error_body(Refused(str(error), status=500)))
    else:
        yield answer.end()


async def _send_error(error: Refused, send: Send) -> None:
    body = orjson.dumps(error_body(error))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    # A client that has left needs no answer.
    with contextlib.suppress(OSError):
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def _write_line(scope: Message, account: Account, total_s: float) -> None:
    if scope["path"] == "/health" and account.status == 200:
        return
    # As it was sent, so that nothing in it can play with the terminal.
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:100]
    words = [time.strftime("%H:%M:%S"), scope["method"], path, str(account.status)]
    answer, ticket = account.answer, account.ticket
    if answer is not None and ticket is not None:
        words.append(f"{answer.wanted.num_prompt_tokens} + {answer.num_tokens} tokens")
        if ticket.first_s is not None:
            words.append(f"first after {ticket.first_s:.2f} s")
        if isinstance(ticket.failure, (Closing, ModelFailed)):
            words.append("not finished")
    note("  ".join([*words, f"{total_s:.2f} s"]))

"""What clients get who do it wrong, leave early, or come all at once."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gristmill.infer.serve import app, server
from gristmill.models.device import memory_bytes

from .conftest import KEY, serving

LONG = {"prompt": "ab", "max_tokens": 400, "ignore_eos": True}
SHORT = {"prompt": "ab", "max_tokens": 4, "temperature": 0}
HELLO = [{"role": "user", "content": "hello"}]


def connection(running, timeout=30):
    return http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=timeout)


def open_stream(running, body=LONG):
    """A connection whose stream has begun."""
    client = connection(running)
    body = json.dumps({**body, "stream": True})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    client.request("POST", "/v1/completions", body, headers)
    answer = client.getresponse()
    assert answer.status == 200
    while not (line := answer.readline()).startswith(b"data: "):
        assert line in (b": waiting\n", b"\n")
    return client, answer


def test_health_and_models(chatty):
    assert chatty.ask("/health") == (200, {"status": "ok", "active": 0, "waiting": 0})
    status, models = chatty.ask("/v1/models")
    assert status == 200
    assert models["data"][0]["max_model_len"] == 96


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", b"{", 400, "no JSON"),
        ("/v1/completions", b"[1]", 400, "must be a JSON object, not a list"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "no JSON"),
        ("/v1/completions", b"[" * 5000, 400, "no JSON"),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "no JSON"),
        ("/v1/completions", {}, 400, "prompt is missing"),
        ("/v1/completions", {"prompt": "x" * 500}, 400, "at most 96 tokens"),
        ("/v1/completions", {**SHORT, "max_tokens": 95}, 400, "at most 96 tokens"),
        ("/v1/completions", {**SHORT, "model": "gpt-5"}, 404, "there is no model 'gpt-5'"),
        ("/v1/completions", {**SHORT, "colour": "red"}, 400, "unknown setting (colour)"),
        ("/v1/chat/completions", {"messages": []}, 400, "not empty"),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [{}]}, 400, "tools is not supported"),
        ("/v1/nothing", {}, 404, "there is no POST /v1/nothing here"),
        ("/v1/completions", None, 405, "there is no GET /v1/completions here"),
        ("/", None, 404, "POST /v1/chat/completions"),
    ],
)
def test_mistakes_are_told(chatty, path, body, status, says):
    got, answer = chatty.ask(path, body)
    assert got == status
    assert says in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_what_nobody_foresaw_is_told_as_json(chatty, monkeypatch, capsys):
    def broken(self, *_):
        raise ZeroDivisionError("a secret of the house")

    monkeypatch.setattr("gristmill.infer.serve.requests.Reader.check_model", broken)
    for path, body in (("/v1/models/tiny", None), ("/v1/completions", SHORT)):
        status, answer = chatty.ask(path, body)
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        assert answer["error"]["message"] == "the server failed. its log says how."
    monkeypatch.undo()
    assert chatty.ask("/v1/completions", SHORT)[0] == 200


def test_context_length_has_its_code(chatty):
    error = chatty.ask("/v1/completions", {"prompt": "x" * 500})[1]["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"


def test_other_kinds_of_content_are_refused(chatty):
    # What a page in a browser may send to anybody without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, answer = chatty.ask("/v1/completions", SHORT, Content_Type=kind)
        assert status == 415
        assert "Content-Type: application/json" in answer["error"]["message"]


def test_names_of_other_machines_are_refused_without_a_key(chatty, base_model):
    for name in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "[::2]:80",
        "10.0.0.1",
    ):
        status, answer = chatty.ask("/v1/models", Host=name)
        assert status == 403, name
        assert "does not answer to the name" in answer["error"]["message"]
    for name in ("localhost", "LOCALHOST:1", "127.0.0.2:99", "[::1]:80", "a.localhost"):
        assert chatty.ask("/v1/models", Host=name)[0] == 200
    with serving(base_model, key=KEY) as running:
        assert running.ask("/v1/models", key=KEY, Host="my.example")[0] == 200


def test_the_key_guards_all_but_health(base_model):
    with serving(base_model, key=KEY) as running:
        assert running.ask("/health")[0] == 200
        for path in ("/v1/models", "/v1/nothing", "/docs", "/openapi.json"):
            status, answer = running.ask(path)
            assert status == 401, path
            assert answer["error"]["code"] == "invalid_api_key"
        for wrong in (KEY[:-1], KEY + "x", "", "é"):
            assert running.ask("/v1/completions", SHORT, Authorization=f"Bearer {wrong}")[0] == 401
        assert running.ask("/v1/completions", SHORT, Authorization=f"Basic {KEY}")[0] == 401
        assert running.ask("/v1/completions", SHORT, Authorization=f"bearer {KEY}")[0] == 200


def test_oversized_requests(base_model):
    with serving(base_model, max_request_bytes=2000) as running:
        body = json.dumps({"prompt": "x" * 3000}).encode()
        status, answer = running.ask("/v1/completions", body)
        assert status == 413
        assert "at most 2,000 bytes" in answer["error"]["message"]
        client = connection(running)
        kind = {"Content-Type": "application/json"}
        # In pieces of unknown total, and announced but never sent.
        client.request("POST", "/v1/completions", iter([body] * 100), kind, encode_chunked=True)
        assert client.getresponse().status == 413
        client = connection(running)
        client.putrequest("POST", "/v1/completions")
        for name, value in {**kind, "Content-Length": str(10**12)}.items():
            client.putheader(name, value)
        client.endheaders()
        assert client.getresponse().status == 413
        assert running.ask("/v1/completions", SHORT)[0] == 200


def test_slow_senders_are_sent_away(chatty, monkeypatch):
    monkeypatch.setattr(app, "BODY_S", 0.1)
    client = connection(chatty)
    client.putrequest("POST", "/v1/completions")
    client.putheader("Content-Type", "application/json")
    client.putheader("Content-Length", "100")
    client.endheaders(b"{")
    assert client.getresponse().status == 408


def test_no_http_at_all(chatty):
    host, port = chatty.url.removeprefix("http://").split(":")
    for nonsense in (b"\x16\x03\x01\x02", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 10**6):
        plain = socket.create_connection((host, int(port)), timeout=5)
        # The server may leave before all is sent.
        with plain, contextlib.suppress(OSError):
            plain.sendall(nonsense)
            plain.shutdown(socket.SHUT_WR)
            assert plain.recv(100).startswith(b"HTTP/1.1 400")
    assert chatty.ask("/v1/completions", SHORT)[0] == 200


def test_a_full_queue_says_429(slow_server):
    running = slow_server()
    streams = [open_stream(running) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(running.ask, "/v1/completions", SHORT) for _ in range(2)]
        while running.service.engine.num_waiting < 2:
            time.sleep(0.01)
        status, answer = running.ask("/v1/completions", SHORT)
        assert status == 429
        assert answer["error"]["code"] == "queue_full"
        for client, answer in streams:
            answer.close()
            client.close()
        assert [request.result()[0] for request in waiting] == [200, 200]


def test_those_who_leave_take_nothing_more(slow_server):
    running = slow_server()
    engine = running.service.engine
    client, answer = open_stream(running)
    body = json.dumps(LONG)
    others = [connection(running) for _ in range(2)]
    for other in others:
        other.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    while engine.num_active + engine.num_waiting < 3:
        time.sleep(0.01)
    start = time.monotonic()
    answer.close()
    for one in (client, *others):
        one.close()
    assert running.idle(3)
    assert time.monotonic() - start < 3  # each of them wanted 4 s


def test_the_queue_is_a_queue(slow_server):
    """Whoever waits gets a sign of life, and the row that becomes free."""
    running = slow_server(queue_size=5, batch_size=1)
    first, _ = open_stream(running)
    order = []

    def ask(number):
        running.ask("/v1/completions", {**SHORT, "ignore_eos": True})
        order.append(number)

    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        while running.service.engine.num_waiting <= number:
            time.sleep(0.005)
    first.close()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3]


def test_streams_that_wait_say_so(slow_server, monkeypatch):
    monkeypatch.setattr(app, "QUIET_S", 0.05)
    running = slow_server(batch_size=1)
    first, _ = open_stream(running)
    client = connection(running)
    body = json.dumps({**SHORT, "stream": True})
    client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = client.getresponse()
    assert answer.readline() == b": waiting\n"
    first.close()
    assert answer.read().endswith(b"data: [DONE]\n\n")


def test_too_many_replies_in_one_request(slow_server):
    running = slow_server()
    assert running.ask("/v1/completions", {**SHORT, "n": 4})[0] == 200
    for body in ({**SHORT, "n": 5}, {**SHORT, "prompt": ["a"] * 5}, {"prompt": ["a"] * 3, "n": 2}):
        status, answer = running.ask("/v1/completions", body)
        assert status == 400
        assert "at most 4" in answer["error"]["message"]


def test_a_model_that_fails_fails_those_replies_alone(slow_server, capsys):
    running = slow_server()
    running.rows.failure = RuntimeError("out of memory, say")
    status, answer = running.ask("/v1/completions", SHORT)
    assert status == 500
    assert "the model failed (RuntimeError: out of memory, say)" in answer["error"]["message"]
    assert running.ask("/v1/completions", SHORT)[0] == 200
    client, answer = open_stream(running)
    running.rows.failure = RuntimeError("again")
    events = answer.read().decode().strip().split("\n\n")
    assert "the model failed" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
    client.close()
    assert running.ask("/v1/completions", SHORT)[0] == 200
    assert "Traceback" in capsys.readouterr().err


def test_an_engine_that_died_is_told(slow_server, capsys):
    running = slow_server()
    running.rows.failure = SystemExit("killed")
    assert running.ask("/v1/completions", SHORT)[0] == 503
    for path, body in (("/v1/completions", SHORT), ("/health", None)):
        status, answer = running.ask(path, body)
        assert status == 503
        assert "the engine has failed" in answer["error"]["message"]


def test_lines_about_requests_hold_no_texts_and_no_keys(base_model, capsys):
    with serving(base_model, key=KEY) as running:
        running.ask("/v1/completions", {**SHORT, "prompt": "secret"}, key=KEY)
        running.ask("/v1/%1b[31m", key="a-wrong-key")
        running.ask("/health")
    err = capsys.readouterr().err
    lines = [line.split("  ") for line in err.splitlines()]
    assert [line[1:4] for line in lines] == [
        ["POST", "/v1/completions", "200"],
        ["GET", "/v1/%1b[31m", "401"],
    ]
    assert lines[0][4].endswith("+ 4 tokens")
    for word in ("secret", KEY, "a-wrong-key"):
        assert word not in err


def test_silent_connections_are_ended(chatty, monkeypatch):
    monkeypatch.setattr(server, "STILL_S", 0.5)
    host, port = chatty.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localh")
        with contextlib.suppress(ConnectionError):
            assert plain.recv(10) == b""


def test_clients_that_never_read_are_ended(long_model, monkeypatch):
    monkeypatch.setattr(server, "STILL_S", 0.5)
    # Some megabytes, more than the system keeps for a connection.
    body = json.dumps({**LONG, "n": 6, "logprobs": 20, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with serving(long_model, batch_size=6) as running, socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = running.url.removeprefix("http://").split(":")
        plain.connect((host, int(port)))
        plain.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        while not running.service.engine.num_active:
            time.sleep(0.01)
        end = time.monotonic() + 30
        while running.web.server_state.connections and time.monotonic() < end:
            time.sleep(0.05)
        assert not running.web.server_state.connections
        assert running.idle(5)


class Connection:
    """What the server's watch sees of a connection."""

    def __init__(self, cycle, unread=0):
        self.cycle, self.unread, self.is_aborted = cycle, unread, False
        self.transport = self

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.is_aborted = True


class Cycle:
    def __init__(self, *, response_complete):
        self.response_complete = response_complete


def test_only_clients_that_do_not_move_are_ended(monkeypatch):
    monkeypatch.setattr(server, "STILL_S", 10)
    clock = iter(range(0, 100, 6))
    monkeypatch.setattr(server.time, "monotonic", lambda: next(clock))
    nothing_asked = Connection(None)
    asks_again = Connection(Cycle(response_complete=True))
    waits_for_us = Connection(Cycle(response_complete=False))
    reads_slowly = Connection(Cycle(response_complete=False), unread=1000)
    reads_the_end = Connection(Cycle(response_complete=True), unread=1000)
    reads_nothing = Connection(Cycle(response_complete=False), unread=1000)
    connections = [nothing_asked, asks_again, waits_for_us]
    connections += [reads_slowly, reads_the_end, reads_nothing]
    still = {}
    for _ in range(4):
        still = server._end_still(connections, still)
        asks_again.cycle = Cycle(response_complete=True)
        reads_slowly.unread -= 1
        reads_the_end.unread -= 1
    ended = [connection for connection in connections if connection.is_aborted]
    assert ended == [nothing_asked, reads_nothing]


def test_more_connections_than_anybody_needs_are_cut_off(base_model, monkeypatch):
    monkeypatch.setattr(server, "MORE_CONNECTIONS", 2 - 256)
    with serving(base_model) as running, contextlib.ExitStack() as stack:
        host, port = running.url.removeprefix("http://").split(":")
        plain = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            for _ in range(4)
        ]
        for one in plain[2:]:
            with contextlib.suppress(ConnectionError):
                assert one.recv(10) == b""
        plain[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain[0].recv(100).startswith(b"HTTP/1.1 200")


FIFTY = {"right": 15, "stream": 9, "leave": 10, "n": 1, "malformed": 3, "too long": 3}
FIFTY |= {"oversized": 3, "other setting": 3, "no key": 3}


def one_of_fifty(running, kind, text):
    """Whether a client of this kind got what it should."""

    def status(path, body, key=KEY):
        return running.ask(path, body, key=key)[0]

    if kind == "right":
        got, answer = running.ask("/v1/completions", SHORT, key=KEY)
        return got == 200 and answer["choices"][0]["text"] == text
    if kind in ("stream", "leave"):
        client, answer = open_stream(running, LONG if kind == "leave" else {**SHORT, "n": 2})
        said = answer.read() if kind == "stream" else b"data: [DONE]\n\n"
        client.close()
        return said.endswith(b"data: [DONE]\n\n")
    if kind == "no key":
        return status("/v1/completions", SHORT, None) == 401
    body, code = {
        "n": ({**SHORT, "n": 3}, 200),
        "malformed": (b"{]", 400),
        "too long": ({"prompt": "x" * 40_000}, 400),
        "oversized": ({"prompt": "x" * 60_000}, 413),
        "other setting": ({**SHORT, "messages": []}, 400),
    }[kind]
    return status("/v1/completions", body) == code


def test_fifty_clients(long_model):
    """Right answers, right codes, nothing left behind, whatever some of them do."""
    kinds = [kind for kind, count in FIFTY.items() for _ in range(count)]
    random.Random(0).shuffle(kinds)
    assert len(kinds) == 50
    with serving(long_model, key=KEY, batch_size=4, max_request_bytes=50_000) as running:
        text = running.ask("/v1/completions", SHORT, key=KEY)[1]["choices"][0]["text"]
        threads, memory = threading.active_count(), memory_bytes(torch.device("cpu")).current
        with ThreadPoolExecutor(50) as pool:
            right = list(pool.map(lambda kind: one_of_fifty(running, kind, text), kinds))
        assert [kind for kind, is_right in zip(kinds, right, strict=True) if not is_right] == []
        assert running.idle()
        assert threading.active_count() <= threads + 2  # those that read large requests
        assert memory_bytes(torch.device("cpu")).current < memory + 200e6
        assert running.ask("/health") == (200, {"status": "ok", "active": 0, "waiting": 0})

"""A small Hugging Face hub on this machine, with a store of its own for large files.

It knows what the hub's client asks: a repository's commit, its tree, and its files with ranges.
Large files are redirected to another port, as the hub does. Connections can be cut on purpose.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = 1000
"""Files of more bytes are in the store for large files."""


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    commit: str = "a" * 40
    revisions: tuple[str, ...] = ("main",)


@dataclass
class Hub:
    """What the servers hold, what they were asked, and where they cut connections."""

    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    """Files that are just there, by path."""
    tokens: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By a file's last name: bytes of the next answers after which the connection is cut."""
    tags: dict[str, str] = field(default_factory=dict)
    """ETags of plain files; without one they have none."""
    ranges: bool = True
    url: str = ""
    store: str = ""

    def gets(self, name: str) -> list[dict[str, str]]:
        """Headers of the requests for a file's bytes, in order."""
        return [h for method, path, h in self.asked if method == "GET" and path.endswith(name)]

    def __enter__(self) -> Hub:
        self._servers = [self._serve(_HubHandler), self._serve(_StoreHandler)]
        self.url, self.store = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _serve(self, handler: type[_Handler]) -> ThreadingHTTPServer:
        bound = type(handler.__name__, (handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    posted: dict[str, list[str]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.posted = parse_qs(body)
        if "json" in self.headers.get("Content-Type", ""):
            self.posted = json.loads(body)
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        self.answer(path)

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say_json(self, value: object) -> None:
        self.say(200, json.dumps(value).encode(), Content_Type="application/json")

    def say_file(self, name: str, data: bytes, tag: str = "", **headers: str) -> None:
        """The bytes asked for, or as many as the next cut allows."""
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", tag) == tag
        if wanted and fresh and self.hub.ranges:
            start, status = int(wanted[1]), 206
            if start >= len(data):
                self.say(416, Content_Range=f"bytes */{len(data)}")
                return
        body = data[start:]
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(name.rpartition("/")[2])
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)


class _HubHandler(_Handler):
    def answer(self, path: str) -> None:
        hub = self.hub
        if path in hub.plain:
            self.say_file(path, hub.plain[path], hub.tags.get(path, ""))
            return
        if api := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)/([^/]+)(?:/(.+))?)?", path
        ):
            kind, name, verb, revision, folder = api.groups()
            repository = getattr(hub, kind).get(name)
            if "expired" in self.headers.get("Authorization", ""):
                self.say(401, X_Error_Message="Invalid credentials in Authorization header")
            elif repository is None:
                self.say(401, b'{"error":"x"}', X_Error_Code="RepoNotFound")
            elif revision and revision not in (*repository.revisions, repository.commit):
                self.say(404, b'{"error":"x"}', X_Error_Code="RevisionNotFound")
            elif verb == "tree":
                deep = "recursive=true" in urlsplit(self.path).query.lower()
                self.say_json(_listed(repository, f"{folder}/" if folder else "", deep))
            elif verb == "paths-info":
                entries = _listed(repository, "", True)
                self.say_json([e for e in entries if e["path"] in self.posted["paths"]])
            else:
                siblings = [{"rfilename": file} for file in repository.files]
                self.say_json({"id": name, "sha": repository.commit, "siblings": siblings})
            return
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = (hub.datasets if file[1] else hub.models).get(file[2])
            self.resolve(repository, file[4])
            return
        self.say(404)

    def resolve(self, repository: Repository | None, name: str) -> None:
        if repository is None or name not in repository.files:
            self.say(404, X_Error_Code="EntryNotFound")
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.gated and token not in self.hub.tokens:
            self.say(403 if token else 401, X_Error_Code="GatedRepo")
            return
        data = repository.files[name]
        digest = hashlib.sha256(data).hexdigest()
        # What the hub's own client looks for.
        known = {"X_Repo_Commit": repository.commit, "X_Linked_ETag": f'"{digest}"'}
        if len(data) > LARGE:
            place = f"{self.hub.store}/{digest}/{quote(name)}"
            self.say(302, Location=place, X_Linked_Size=str(len(data)), **known)
        else:
            self.say_file(name, data, '"small"', **known)


class _StoreHandler(_Handler):
    def answer(self, path: str) -> None:
        digest, _, name = path.lstrip("/").partition("/")
        if "authorization" in {key.lower() for key in self.headers}:
            self.say(400)
            return
        for repository in (*self.hub.models.values(), *self.hub.datasets.values()):
            data = repository.files.get(name)
            if data is not None and hashlib.sha256(data).hexdigest() == digest:
                self.say_file(name, data, f'"{digest}"')
                return
        self.say(404)


def _listed(repository: Repository, folder: str, deep: bool) -> list[dict[str, object]]:
    """What is in a folder: files, and the folders among them."""
    found: dict[str, dict[str, object]] = {}
    for path, data in sorted(repository.files.items()):
        if path.startswith(folder):
            parts = path[len(folder) :].split("/")
            for depth in range(1, len(parts) if deep else min(2, len(parts))):
                name = folder + "/".join(parts[:depth])
                found.setdefault(name, {"type": "directory", "path": name, "oid": "d" * 40})
            if deep or len(parts) == 1:
                found[path] = _entry(path, data)
    return list(found.values())


def _entry(path: str, data: bytes) -> dict[str, object]:
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if len(data) > LARGE:
        entry["oid"] = "b" * 40
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry

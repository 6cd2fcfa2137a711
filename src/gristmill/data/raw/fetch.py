"""Files over HTTP, whole or not at all: several at once, going on where an interruption left them.

What has come of a file lies in `OUT/.gristmill/download/` and is renamed into place when it has the
announced size and digest, so a file that can be seen is complete. A broken connection is taken up
again with a range request; so is the next run's, when the server still has the same content.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from gristmill import __version__
from gristmill.util.errors import RunError, UserError

STATE = ".gristmill"
"""Folder of the target directory that holds what is not finished; hidden from preparation."""

_READ_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30
_TRIES = 5
# Before the second try; doubled before each further one that brought nothing.
_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0
# A compressed answer would have another size and other offsets than the file.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"gristmill/{__version__}"}
_BUSY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Remote:
    """A file to fetch: its address, and its name below the target directory."""

    url: str
    name: str
    size: int = -1
    """Bytes; -1: the server says."""
    digest: str = ""
    """`sha256:HEX` of the content or `git:HEX`, its blob in git; empty: unknown."""


@dataclass
class Outcome:
    """What a fetch did."""

    fetched: int = 0
    kept: int = 0
    bytes: int = 0
    """Bytes that came over the line."""
    failed: list[tuple[Remote, str]] = field(default_factory=list)


class Refused(Exception):
    """The server will not give the file to us: status, its code for the reason, the file."""

    def __init__(self, file: Remote, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.file, self.status, self.code = file, status, code


class _Again(Exception):
    """Trouble that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Failed(Exception):
    """Trouble with one file that trying again does not mend."""


class Stopped(Exception):
    """Somebody asked all workers to leave."""


class Fetcher:
    """Fetches files into one directory. `headers` go to the host of `origin` only."""

    def __init__(
        self,
        out: Path,
        *,
        origin: str = "",
        headers: dict[str, str] | None = None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._out, self._parts = out, out / STATE / "download"
        self._secrets, self._on_bytes = headers or {}, on_bytes
        self._origin = _origin(origin)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._known: dict[str, str] = {}
        self._opener = urllib.request.build_opener(_Redirects(self._authorise))

    def fetch(self, files: Sequence[Remote], num_workers: int) -> Outcome:
        """Fetch what is not there yet. Files that cannot be had are named in the outcome.

        Raises Refused when the server wants other credentials, RunError when the disk is full.
        """
        outcome = Outcome()
        with self._exclusive(), ThreadPoolExecutor(max(1, num_workers)) as pool:
            self._load_known()
            tasks = [pool.submit(self._one, file, outcome) for file in files]
            try:
                done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
            for task in done:
                if (error := task.exception()) is not None:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise error
        return outcome

    def missing_bytes(self, files: Sequence[Remote]) -> int:
        """Bytes still to come, as far as sizes are known; a file of the right size counts as there.

        What is begun is subtracted.
        """
        left = 0
        for file in files:
            if file.size >= 0 and _size(self._out / file.name) != file.size:
                left += file.size - min(file.size, max(0, _size(self._part(file))))
        return left

    def _one(self, file: Remote, outcome: Outcome) -> None:
        if self._stop.is_set():
            raise Stopped
        try:
            if self._is_there(file):
                with self._lock:
                    outcome.kept += 1
                return
            count = self._fetch(file)
        except _Failed as error:
            with self._lock:
                outcome.failed.append((file, str(error)))
            return
        except OSError as error:
            raise RunError(
                f"cannot write {self._out / file.name} ({error.strerror or error}). "
                "mend that (free some space?) and run the same command again: it goes on."
            ) from error
        with self._lock:
            outcome.fetched += 1
            outcome.bytes += count

    def _fetch(self, file: Remote) -> int:
        """Bring the file here; the bytes that came over the line."""
        part = self._part(file)
        fruitless = came = 0
        while True:
            before = max(0, _size(part))
            try:
                self._attempt(file, part)
                self._check(file, part)
                break
            except _Again as trouble:
                grown = max(0, _size(part)) - before
                fruitless = 0 if grown > 0 else fruitless + 1
                came += max(0, grown)
                if fruitless >= _TRIES:
                    raise _Failed(str(trouble)) from trouble
                pause = max(trouble.wait, _WAIT_SECONDS * 2**fruitless / 2)
                if self._stop.wait(min(pause, _LONGEST_WAIT_SECONDS)):
                    raise Stopped from trouble
        came += _size(part) - before
        target = self._out / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
        _sidecar(part).unlink(missing_ok=True)
        self._remember(file)
        return came

    def _attempt(self, file: Remote, part: Path) -> None:
        """Append what is missing of the part; `_Again` when the line breaks."""
        at = max(0, _size(part))
        if 0 <= file.size == at:
            part.touch()
            return
        seen = _read_json(_sidecar(part))
        request = urllib.request.Request(file.url, headers=_HEADERS)
        if at:
            request.add_header("Range", f"bytes={at}-")
            # A digest tells afterwards whether the pieces belong together; else the server must.
            if not file.digest and seen.get("tag"):
                request.add_header("If-Range", seen["tag"])
        with self._response(file, request, part, at) as response:
            start, total = _extent(response, at)
            if 0 <= file.size != total >= 0:
                raise _Failed(f"the server has {total:,} bytes of it, expected are {file.size:,}")
            if start != at or (at and not file.digest and seen.get("total") != total):
                start = 0
                if at and response.status == 206:
                    part.unlink()
                    raise _Again("its content has changed on the server")
            _sidecar(part).write_text(json.dumps({"tag": _tag(response), "total": total}))
            with part.open("r+b" if start else "wb") as sink:
                sink.seek(start)
                self._copy(response, sink)
                sink.flush()
                os.fsync(sink.fileno())
        if total >= 0 and _size(part) != total:
            raise _Again(f"the connection broke after {_size(part):,} of {total:,} bytes")

    def _copy(self, response: IO[bytes], sink: IO[bytes]) -> None:
        while True:
            if self._stop.is_set():
                raise Stopped
            try:
                data = response.read(_READ_BYTES)
            except http.client.IncompleteRead as error:
                sink.write(error.partial)
                raise _Again("the connection broke") from error
            except (OSError, http.client.HTTPException) as error:
                raise _Again(_reason(error)) from error
            if not data:
                return
            sink.write(data)
            self._on_bytes(len(data))

    @contextlib.contextmanager
    def _response(
        self, file: Remote, request: urllib.request.Request, part: Path, at: int
    ) -> Iterator[Any]:
        """The open response; what the server says against it in our words."""
        self._authorise(request)
        try:
            response = self._opener.open(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and at:
                    part.unlink()
                    raise _Again("the server has less of it than came before") from None
                if error.code in _BUSY:
                    asked = error.headers.get("Retry-After", "")
                    pause = float(asked) if asked.isdigit() else 0.0
                    raise _Again(f"the server answers {error.code}", pause) from None
                if error.code in (401, 403):
                    code = error.headers.get("X-Error-Code", "")
                    raise Refused(file, error.code, code) from None
                raise _Failed(f"the server answers {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(_reason(error)) from None
        with response:
            yield response

    def _check(self, file: Remote, part: Path) -> None:
        if file.digest and _digest(part, file.digest) != file.digest:
            part.unlink()
            raise _Again("its content is not what the repository says")

    def _is_there(self, file: Remote) -> bool:
        """Whether the target is this file, complete."""
        target = self._out / file.name
        size = _size(target)
        if size < 0:
            return False
        if file.digest:
            if self._known.get(file.name) == file.digest and size == file.size:
                return True
            if size != file.size or _digest(target, file.digest) != file.digest:
                return False
            self._remember(file)
            return True
        return size == self._announced(file)

    def _announced(self, file: Remote) -> int:
        """The size that the server gives for the file, -1 where it does not say."""
        request = urllib.request.Request(file.url, headers=_HEADERS, method="HEAD")
        self._authorise(request)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                return int(response.headers.get("Content-Length", -1))
        except (OSError, http.client.HTTPException, ValueError):
            return -1

    def _authorise(self, request: urllib.request.Request) -> None:
        """Put our headers on a request for the origin; a redirect elsewhere goes without them."""
        if _origin(request.full_url) == self._origin:
            for name, value in self._secrets.items():
                request.add_unredirected_header(name, value)

    def _part(self, file: Remote) -> Path:
        key = hashlib.sha256(f"{file.name}\0{file.digest or file.url}".encode()).hexdigest()
        return self._parts / f"{key[:32]}.part"

    def _load_known(self) -> None:
        """What is known of finished files: a line that a crash cut short is not."""
        with contextlib.suppress(FileNotFoundError):
            for line in self._record.read_text().splitlines():
                name, _, digest = line.rpartition("\t")
                self._known[name] = digest

    def _remember(self, file: Remote) -> None:
        if file.digest:
            with self._lock, self._record.open("a") as record:
                record.write(f"{file.name}\t{file.digest}\n")

    @property
    def _record(self) -> Path:
        return self._out / STATE / "downloaded.tsv"

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the directory: two processes would write into one part."""
        self._parts.mkdir(parents=True, exist_ok=True)
        with (self._out / STATE / "download.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"another download into {self._out} is running. wait for it, or name another "
                    "directory with --out_dir."
                ) from error
            yield


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; our headers go along only where `authorise` puts them."""

    def __init__(self, authorise: Callable[[urllib.request.Request], None]) -> None:
        self._authorise = authorise

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request for the new place."""
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.method = req.get_method()
            self._authorise(request)
        return request


def _extent(response: Any, at: int) -> tuple[int, int]:
    """Where the body begins in the file, and the file's size (-1: not said)."""
    if response.status == 206:
        unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = rest.partition("/")
        start = span.partition("-")[0]
        if unit == "bytes" and start.isdigit():
            return int(start), int(total) if total.isdigit() else -1
        raise _Again("the server's answer to a range request makes no sense")
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else -1


def _tag(response: Any) -> str:
    """What names the content on the server, usable with If-Range; empty for nothing."""
    tag = response.headers.get("ETag", "")
    return "" if tag.startswith("W/") else tag or response.headers.get("Last-Modified", "")


def _digest(path: Path, like: str) -> str:
    """The file's digest of the kind that `like` is."""
    kind = like.partition(":")[0]
    hashed = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        hashed.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            hashed.update(data)
    return f"{kind}:{hashed.hexdigest()}"


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _sidecar(part: Path) -> Path:
    return part.with_suffix(".json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None) or error
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)

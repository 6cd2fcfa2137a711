"""Files of a folder or of an object store behind one face; the one place that knows fsspec.

A visible file is a whole file: on a disk it is renamed into place, on an object store one PUT makes
it visible. Names are relative to the root, with forward slashes.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from gristmill.util.errors import UserError
from gristmill.util.extras import install_command

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_READ_BYTES = 8 << 20
_SCRAPS = ".*." + "[0-9a-f]" * 12 + ".tmp"
# How disks without links, such as mounted buckets, refuse to make one.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
# What to install for a URL, by its scheme.

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def is_url(path: str | Path) -> bool:
    """Whether `path` is a URL such as s3://bucket/folder."""
    return _URL.match(str(path)) is not None


@dataclass(frozen=True)
class Entry:
    """A file of a storage: its name below the root, its bytes, and what changes when it does."""

    name: str
    size: int
    version: str
    """Entity tag where the store has them, else the time of the last change; for comparison."""


class Storage:
    """A folder or a URL prefix, `root`, with whole files in it. Cheap to make, and it pickles."""

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        self.is_local = not is_url(text) or text.startswith("file://")
        if self.is_local:
            text = str(Path(text.removeprefix("file://")).expanduser())
        self.root = text if self.is_local else text.rstrip("/")

    def __repr__(self) -> str:
        """The root, as the user gave it."""
        return f"Storage({self.root!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections stay behind."""
        return Storage, (self.root,)

    @property
    def path(self) -> Path:
        """The folder, for a local storage."""
        assert self.is_local
        return Path(self.root)

    def at(self, name: str) -> str:
        """The full path or URL of a file, for messages and for other libraries."""
        if self.is_local:
            return str(self.path / name) if name else self.root
        return f"{self.root}/{name}" if name else self.root

    def below(self, name: str) -> Storage:
        """The storage of a folder in this one."""
        return Storage(self.at(name))

    def open(self, name: str) -> BinaryIO:
        """The file for reading, seekable. Raises FileNotFoundError."""
        if self.is_local:
            return cast(BinaryIO, (self.path / name).open("rb", buffering=0))
        # One block ahead: files are read from front to back.
        return cast(
            BinaryIO,
            self._fs.open(self._key(name), "rb", cache_type="readahead", block_size=_READ_BYTES),
        )

    def stat(self, name: str) -> Entry:
        """Size and version of a file. Raises FileNotFoundError."""
        if self.is_local:
            found = os.stat(self.path / name)
            return Entry(name, found.st_size, str(found.st_mtime_ns))
        return self._entry(name, self._fs.info(self._key(name)))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        if self.is_local:
            return (self.path / name).is_file()
        # Not `isfile`: that one takes a store that does not answer for one without the file.
        self._fs.invalidate_cache()
        try:
            return bool(self._fs.info(self._key(name))["type"] == "file")
        except FileNotFoundError:
            return False

    def list(self, folder: str = "") -> Iterator[Entry]:
        """Every file below `folder`, sorted by name; none when there is no such folder."""
        if self.is_local:
            base = self.path / folder
            names = sorted(p.relative_to(self.path).as_posix() for p in base.rglob("*"))
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if (self.path / name).is_file():
                        yield self.stat(name)
            return
        self._fs.invalidate_cache()
        key = self._key(folder)
        found = self._fs.find(key, detail=True)
        start = len(self._key("")) + 1
        for full in sorted(found):
            # A folder that gets its first file while it is listed is found itself.
            if found[full].get("type") != "directory":
                yield self._entry(full[start:], found[full])

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        if self.is_local:
            return (self.path / name).read_bytes()
        return cast(bytes, self._fs.cat_file(self._key(name)))

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file there, in the place of an older one."""
        if not self.is_local:
            self._fs.pipe_file(self._key(name), data)
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scrap = _scrap(path)
        try:
            _write_down(scrap, data)
            os.replace(scrap, path)
        finally:
            scrap.unlink(missing_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """Put a whole file there unless there is one: False, and nothing is changed, if there is.

        Of several at once exactly one succeeds, where the store has conditional writes or the disk
        has links.
        """
        if not self.is_local:
            try:
                self._fs.pipe_file(self._key(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scrap = _scrap(path)
        try:
            _write_down(scrap, data)
            os.link(scrap, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(scrap, path)
        finally:
            scrap.unlink(missing_ok=True)
        return True

    def put(self, source: Path, name: str) -> None:
        """Bring a local file there, whole; it is moved where that costs nothing."""
        if not self.is_local:
            self._fs.put_file(str(source), self._key(name))
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            scrap = _scrap(target)
            shutil.copyfile(source, scrap)
            os.replace(scrap, target)
            source.unlink()

    def copy_in(self, source: Path, name: str) -> None:
        """Copy a local file there, whole; it stays where it is."""
        if not self.is_local:
            self._fs.put_file(str(source), self._key(name))
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        scrap = _scrap(target)
        try:
            shutil.copyfile(source, scrap)
            os.replace(scrap, target)
        finally:
            scrap.unlink(missing_ok=True)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to the local path `target`."""
        with self.open(name) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _READ_BYTES)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens when there is none."""
        if self.is_local:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._key(name), recursive=True)

    def remove_scraps(self, folder: str = "") -> None:
        """Remove what killed writers left in a folder. Nobody may be writing there."""
        if self.is_local:
            for path in (self.path / folder).glob(_SCRAPS):
                path.unlink(missing_ok=True)

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        try:
            return _Calls(fsspec.core.url_to_fs(self.root)[0])
        except (ImportError, ValueError) as error:
            scheme = self.root.partition("://")[0]
            extra = _EXTRAS.get(scheme)
            advice = (
                f"install it with `{install_command(extra)}`."
                if extra
                else "name a local path, or install the fsspec file system for it."
            )
            raise UserError(f"{self.root} cannot be opened ({error}). {advice}") from error

    def _key(self, name: str) -> str:
        root = cast(str, self._fs._strip_protocol(self.root))
        return f"{root.rstrip('/')}/{name}" if name else root

    def _entry(self, name: str, info: dict[str, Any]) -> Entry:
        version = ""
        for field in ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime", "mtimeMs"):
            if info.get(field):
                version = str(info[field])
                break
        return Entry(name, int(info["size"] or 0), version)


class _Calls:
    """A file system whose functions raise OSError whatever the libraries below it raise."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._fs, name)

        def call(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except OSError:
                raise
            except Exception as error:
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

        return call


def is_scrap(name: str) -> bool:
    """Whether a local file is one that a killed writer left."""
    return fnmatch.fnmatchcase(name, _SCRAPS)


def _scrap(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _write_down(path: Path, data: bytes) -> None:
    """A file that a loss of power does not empty."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

"""Which files are read: those of a folder, or below a URL, that match a pattern.

Paths are relative to the input folder, in Unicode normal form C with forward slashes, and sorted by
their bytes, so that the order is the same on every machine.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path, PurePosixPath

from gristmill.data.raw.documents import Input
from gristmill.data.storage import Entry, Storage, is_url
from gristmill.util.errors import UserError

CACHE = ".gristmill"
"""Folder of prepared datasets beside raw text; hidden folders are never taken as input."""

_UNREAD = {".bz2", ".xz", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"}
_PREPARED = {"manifest.json", "index.json"}
# What Hugging Face datasets puts beside the data of a dataset that was saved to disk.
_SAVED = {"dataset_info.json", "state.json", "dataset_dict.json"}
# In a glob, a `?` that stands for itself is in brackets.
_ANY_ONE = re.compile(r"(\[.[^]]*\])|\?")


def root_of(path: str | Path) -> Storage:
    """The folder or URL that input paths are relative to: `path`, or that of a single file."""
    return _located(path)[0]


def list_inputs(
    path: str | Path, pattern: str, *, exclude: Sequence[str | Path] = ()
) -> list[Input]:
    """The files below a folder or URL that match `pattern`, or the one file at `path`, sorted.

    Hidden files and folders are left out, and so is what lies in `exclude`; a file that is reached
    by two names is taken once. Raises UserError when there is nothing, or a form that is not read.
    """
    root, name = _located(path)
    if name:
        entry = _stat(root, name)
        found = [Input(_normal(name), name, entry.size, entry.version)]
    else:
        found = _matching(root, pattern, exclude)
    for item in found:
        suffix = PurePosixPath(item.place).suffix.lower()
        if suffix in _UNREAD:
            raise UserError(
                f"{root.at(item.place)} is in a form that is not read ({suffix}). "
                f"unpack or convert it, or narrow the pattern {pattern!r} (--pattern)."
            )
    return found


def _located(path: str | Path) -> tuple[Storage, str]:
    """(root, "") for a folder, (its folder, name) for a file. Raises UserError for neither."""
    storage = Storage(path)
    if storage.is_local:
        if storage.path.is_dir():
            return storage, ""
        if storage.path.is_file():
            return Storage(storage.path.parent), storage.path.name
        raise UserError(f"there is no file or folder {storage.root}. check the path of the input.")
    above, _, name = storage.root.rpartition("/")
    is_inside = not above.endswith("/")  # s3://bucket alone is a folder
    if is_inside and not str(path).endswith("/"):
        try:
            if Storage(above).exists(name):
                return Storage(above), name
        except (OSError, ValueError) as error:
            raise _refused(storage.root, error) from error
    return storage, ""


def _refused(url: str, error: Exception) -> UserError:
    return UserError(
        f"{url} cannot be read ({error}). check the URL, and the credentials of its store."
    )


def _stat(root: Storage, name: str) -> Entry:
    try:
        return root.stat(name)
    except OSError as error:
        raise UserError(
            f"{root.at(name)} cannot be read ({error.strerror or error}). "
            "mend it, move it away, or narrow the pattern (--pattern)."
        ) from None


def _matching(root: Storage, pattern: str, exclude: Sequence[str | Path]) -> list[Input]:
    matches = re.compile(glob_regex(pattern)).fullmatch
    matching: list[tuple[str, str, str, Entry | None]] = []
    others: Counter[str] = Counter()
    for place, real, entry in (
        _remote(root, exclude) if not root.is_local else _local(root, exclude)
    ):
        path = _normal(place)
        if matches(path):
            matching.append((path, place, real, entry))
        else:
            others[PurePosixPath(place).suffix or "no suffix"] += 1
    if not matching:
        if not others:
            raise UserError(
                f"there are no files under {root.root} (hidden ones and prepared "
                "datasets do not count). name another folder, or put text there."
            )
        there = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(6))
        raise UserError(
            f"no file under {root.root} matches {pattern!r} (there: {there}). "
            f"give a pattern that fits, for example --pattern '{_suggestion(others)}'."
        )
    found: dict[str, Input] = {}
    # Two files can have one path: where the disk tells apart what Unicode holds for the same.
    matching.sort(key=lambda m: [name.encode("utf-8", "surrogateescape") for name in m[:2]])
    for path, place, real, entry in matching:
        if real not in found:
            # Pages of a web server name files without their sizes.
            if entry is None or (not entry.size and root.root.startswith("http")):
                entry = _stat(root, place)
            found[real] = Input(path, place, entry.size, entry.version)
    return list(found.values())


def _local(root: Storage, exclude: Sequence[str | Path]) -> Iterator[tuple[str, str, None]]:
    """(place, real path) of every file that may be input; each folder is entered once."""
    top = os.path.realpath(root.root)
    entered = {os.path.realpath(Path(e).expanduser()) for e in exclude if not is_url(e)}
    waiting = [("", top)]
    while waiting:
        below, real_folder = waiting.pop()
        folders: list[tuple[str, str]] = []
        files: list[tuple[str, str]] = []
        for entry in _scanned(root.at(below.rstrip("/"))):
            if entry.name.startswith("."):
                continue
            real = os.path.join(real_folder, entry.name)
            if entry.is_symlink():
                real = os.path.realpath(real)
            (folders if entry.is_dir() else files).append((below + entry.name, real))
        # A prepared dataset: its tokenizer's files are no text of the corpus.
        names = {PurePosixPath(place).name for place, _ in files}
        if names >= _PREPARED:
            continue
        for place, real in files:
            if not _is_beside_data(PurePosixPath(place).name, names):
                yield place, real, None
        inside = []
        for place, real in sorted(folders):
            if real not in entered:
                entered.add(real)
                inside.append((place + "/", real))
        waiting += reversed(inside)  # taken from the end


def _scanned(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {folder} ({error.strerror}). "
            f"give yourself the right to read it: chmod u+rx '{folder}'"
        ) from error


def _remote(root: Storage, exclude: Sequence[str | Path]) -> Iterator[tuple[str, str, Entry]]:
    """(place, itself, entry) of every file below a URL that may be input."""
    try:
        entries = [e for e in root.list() if not e.name.endswith("/")]
    except (OSError, ValueError) as error:
        raise _refused(root.root, error) from error
    names: dict[str, set[str]] = {}
    for entry in entries:
        folder, _, name = entry.name.rpartition("/")
        names.setdefault(folder, set()).add(name)
    prepared = [f"{folder}/" for folder, inside in names.items() if inside >= _PREPARED]
    left_out = tuple(
        [
            *prepared,
            *(
                str(e).rstrip("/")[len(root.root) + 1 :] + "/"
                for e in exclude
                if str(e).startswith(root.root + "/")
            ),
        ]
    )
    for entry in entries:
        folder, _, name = entry.name.rpartition("/")
        hidden = any(part.startswith(".") for part in entry.name.split("/"))
        if hidden or entry.name.startswith(left_out) or "/" in left_out:
            continue
        if not _is_beside_data(name, names[folder]):
            yield entry.name, entry.name, entry


def _is_beside_data(name: str, names: set[str]) -> bool:
    """Whether a file of a saved Hugging Face dataset is something else than its data."""
    if name == "dataset_dict.json":
        return True
    if "state.json" not in names:
        return False
    return name in _SAVED or (name.startswith("cache-") and name.endswith(".arrow"))


def _suggestion(others: Counter[str]) -> str:
    suffixes = [s for s, _ in others.most_common() if s != "no suffix"]
    return f"**/*{suffixes[0]}" if suffixes else "**/*"


def _normal(path: str) -> str:
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def glob_regex(pattern: str) -> str:
    """The glob as a regular expression; `**` stands for any number of folders, also none."""
    parts = []
    components = pattern.split("/")
    for number, component in enumerate(components):
        last = number == len(components) - 1
        if component == "**":
            parts.append(".*" if last else "(?:[^/]+/)*")
            continue
        # fnmatch's `*` and `?` would match a slash too.
        component = _ANY_ONE.sub(lambda found: found[1] or "[!/]", component)
        within = translate(component)[len("(?s:") : -len(r")\Z")]
        within = within.replace(".*", "[^/]*")
        parts.append(within + ("" if last else "/"))
    return "".join(parts)

"""Which tasks there are: those of lm-evaluation-harness, from a list made once a version, and own.

The package has some 14,000 task files and reads them all whenever it starts, which takes between
seconds and minutes. Here it is given the folders of the tasks that are asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gristmill.measure import harness
from gristmill.measure.harness import Entry
from gristmill.util.errors import UserError
from gristmill.util.paths import user_cache_dir


@dataclass(frozen=True)
class Chosen:
    """Tasks that were asked for and exist, and the folders that hold them and their parts."""

    names: list[str]
    folders: list[str]


def names() -> list[str]:
    """Every task, group and tag of the package, sorted."""
    return sorted(known())


def known() -> dict[str, Entry]:
    """The tasks, groups and tags that the package brings along, by name."""
    cache = user_cache_dir() / "evaluate" / f"tasks-{harness.version()}.json"
    home = str(harness.home())
    try:
        held = json.loads(cache.read_text(encoding="utf-8"))
        if held["home"] == home:
            return {name: Entry(*entry) for name, entry in held["tasks"].items()}
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none yet, or a damaged one
    print("Reading all task files, once for this lm-evaluation-harness …", file=sys.stderr)
    found = harness.entries(None)
    _keep(cache, json.dumps({"home": home, "tasks": found}))
    return found


def _keep(cache: Path, text: str) -> None:
    """Write the list, whole or not at all, whoever else does so at once."""
    with contextlib.suppress(OSError):  # the next call reads the package's files again
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=cache.parent, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(partial, cache)
        finally:
            Path(partial).unlink(missing_ok=True)


def choose(asked: Sequence[str], include_path: Sequence[str]) -> Chosen:
    """The tasks that names, patterns with `*` and files mean; own ones go before the package's.

    Raises UserError for those that do not exist, with what is like them.
    """
    own_folders = [_folder(path) for path in include_path]
    own = harness.entries(own_folders) if own_folders else {}
    listed = own
    if not all(task in own or _is_file(task) for task in asked) or _lacks(listed, asked):
        listed = {**known(), **own}
    found: list[str] = []
    for task in asked:
        exact = task in listed or _is_file(task)
        matching = [task] if exact else sorted(fnmatch.filter(listed, task))
        if not matching:
            raise _unknown(task, listed)
        found += matching
    parts = _with_parts(listed, found)
    folders = {str(Path(path).parent) for name in parts if (path := _path(listed, name))}
    # Own folders come last: what is read later has its way.
    package = sorted(folder for folder in folders if not _is_inside(folder, own_folders))
    return Chosen(list(dict.fromkeys(found)), [*_outermost(package), *own_folders])


def _folder(path: str) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--include_path {path} is no folder. Name one with task files.")
    return str(folder.resolve())


def _is_file(task: str) -> bool:
    """Whether a task is named by its own file."""
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


def _path(listed: Mapping[str, Entry], name: str) -> str | None:
    return listed[name].path if name in listed else None


def _with_parts(listed: Mapping[str, Entry], names: Sequence[str]) -> set[str]:
    """These tasks and, of groups and tags, what they are made of."""
    seen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += listed[name].parts if name in listed else []
    return seen


def _lacks(listed: Mapping[str, Entry], names: Sequence[str]) -> bool:
    """Whether a group has parts that are not listed."""
    return any(name not in listed and not _is_file(name) for name in _with_parts(listed, names))


def _is_inside(folder: str, others: Iterable[str]) -> bool:
    return any(Path(folder).is_relative_to(other) for other in others)


def _outermost(folders: Sequence[str]) -> list[str]:
    """Without those that lie in another of them: folders are read with all that is below."""
    kept: list[str] = []
    for folder in folders:
        if not _is_inside(folder, kept):
            kept.append(folder)
    return kept


def _unknown(task: str, everything: Iterable[str]) -> UserError:
    listed = list(everything)
    near = difflib.get_close_matches(task, listed, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        f"there is no task {task!r} among {len(listed):,}. {hint}`gristmill evaluate list` prints "
        "all; --include_path FOLDER adds your own."
    )

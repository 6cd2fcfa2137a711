"""Where records come from: files of the user's, or sets of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol, cast, runtime_checkable

import orjson

from gristmill.config.commands import Download
from gristmill.config.tuning_data import FLAN, JSON, HubRecords, Records
from gristmill.data.raw.download import download
from gristmill.data.raw.fetch import STATE
from gristmill.data.raw.readers import compressed
from gristmill.data.storage import Storage, is_url
from gristmill.finetune.records import Conversation, Skipped, read_conversations
from gristmill.util.errors import RunError, UserError

SUFFIXES = (".json", ".jsonl", ".parquet")
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test", "eval")
"""Names of files in a folder, without their suffixes."""


@runtime_checkable
class OwnRecords(Protocol):
    """A data module of the user's."""

    def records(self) -> tuple[list[Any], list[Any]]:
        """Records to train on, and held-out ones."""


@dataclass(frozen=True)
class Found:
    """Conversations to train on and held-out ones, and what was left out of them."""

    name: str
    """A short word for the data, for the run directory's name."""
    train: list[Conversation]
    val: list[Conversation]
    skipped: Skipped


def find_conversations(data: Records) -> Found:
    """The conversations that a data module means, fetched where they are not here yet.

    Raises UserError for files that hold no such records, RunError when they cannot be had.
    """
    if not 0.0 <= data.val_fraction < 1.0:
        raise UserError(
            f"--data.val_fraction {data.val_fraction:g} is not a share. Use 0 (nothing held out) "
            "to less than 1.",
            {"--data.val_fraction": 0.05},
        )
    name = type(data).__name__.lower()
    if isinstance(data, OwnRecords):
        train, val = data.records()
        parts = [(f"{name}.records()", train)], [(f"{name}.records()", val)]
    elif isinstance(data, JSON):
        name = PurePath(data.json_path).name.partition(".")[0].lower() or name
        parts = _of_files(*_own_files(data))
    elif isinstance(data, HubRecords):
        parts = _of_files(*_hub_files(data))
    else:
        raise UserError(
            f"--data {type(data).__name__} has no records. Give it a method "
            "records() -> (training, held-out)."
        )
    skipped = Skipped()
    train_talks = _conversations(parts[0], data, skipped)
    val_talks = _conversations(parts[1], data, skipped)
    if not val_talks and data.val_fraction:
        train_talks, val_talks = hold_out(train_talks, data.val_fraction, data.seed)
    return Found(name, train_talks, val_talks, skipped)


def hold_out(
    talks: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on and held-out ones, chosen by their content.

    Equal ones come to lie on one side, and where they stand in the file does not matter.
    """
    marks = [_mark(talk, seed) for talk in talks]
    wanted = min(len(talks) - 1, max(1, round(share * len(talks)))) if len(talks) > 1 else 0
    held = set(sorted(marks)[:wanted])
    if len(held) and all(mark in held for mark in marks):
        held = set()  # all are equal
    pairs = list(zip(talks, marks, strict=True))
    return (
        [talk for talk, mark in pairs if mark not in held],
        [talk for talk, mark in pairs if mark in held],
    )


def _mark(talk: Conversation, seed: int) -> bytes:
    words = [(m["role"], m["content"], m.get("input", "")) for m in talk.messages]
    content = json.dumps([seed, words]).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def _conversations(
    parts: Sequence[tuple[str, list[Any]]], data: Records, skipped: Skipped
) -> list[Conversation]:
    found: list[Conversation] = []
    for where, records in parts:
        talks, left_out = read_conversations(
            records,
            where,
            multiturn=data.include_multiturn_conversations,
            skip=data.on_error == "skip",
        )
        found += talks
        skipped.count += left_out.count
        skipped.reasons += [f"{where}: {reason}" for reason in left_out.reasons]
    return found


Parts = list[tuple[str, list[Any]]]


def _of_files(train: Sequence[str | Path], val: Sequence[str | Path]) -> tuple[Parts, Parts]:
    return [(str(f), read_records(f)) for f in train], [(str(f), read_records(f)) for f in val]


def read_records(file: str | Path) -> list[Any]:
    """The records in a file: JSON lines, a JSON list or parquet. UserError for anything else."""
    try:
        content = _content(file)
    except (EOFError, compressed.Damaged) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}). Fetch it again.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}).") from None
    kind = _kind(file)
    if kind == ".parquet":
        records = _parquet(file, content)
    elif kind == ".json":
        records = _json(file, content)
    else:
        records = _lines(file, content)
    if not records:
        raise UserError(f"{file} has no records. Give a file with some.")
    return records


def _content(file: str | Path) -> bytes:
    if is_url(file):
        root, _, name = str(file).rpartition("/")
        opened = Storage(root).open(name)
    else:
        opened = Path(file).expanduser().open("rb")
    with contextlib.closing(opened) as raw:
        stream = compressed.reader(str(file), cast(compressed.Stream, raw))
        pieces = []
        while piece := stream.read(1 << 20):
            pieces.append(piece)
        return b"".join(pieces)


def _kind(file: str | Path) -> str:
    name = PurePath(str(file))
    while name.suffix.lower() in (".gz", ".zst"):
        name = name.with_suffix("")
    kind = {".ndjson": ".jsonl"}.get(name.suffix.lower(), name.suffix.lower())
    if kind in SUFFIXES:
        return kind
    raise UserError(
        f"{file} is no file of records. Give one that ends in .json, .jsonl or .parquet (.gz and "
        ".zst too)."
    )


def _json(file: str | Path, content: bytes) -> list[Any]:
    try:
        value = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        if b"}\n{" in content.replace(b"\r", b""):
            return _lines(file, content)  # JSON lines under another name
        raise UserError(f"{file} is not valid JSON ({error}). Correct it.") from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1:  # {"data": [...]}
            value = lists[0]
    if not isinstance(value, list):
        raise UserError(f"{file} holds {type(value).__name__}, not a list of records. Give a list.")
    return value


def _lines(file: str | Path, content: bytes) -> list[Any]:
    records = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                records.append(orjson.loads(line))
            except ValueError as error:
                raise UserError(
                    f"line {number} of {file} is not valid JSON ({error}). Correct it."
                ) from None
    return records


def _parquet(file: str | Path, content: bytes) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_table(io.BytesIO(content)).to_pylist())
    except ArrowException as error:
        raise UserError(f"{file} is damaged or no parquet ({error}). Fetch it again.") from None


def _own_files(data: JSON) -> tuple[list[str | Path], list[str | Path]]:
    val: list[str | Path] = [data.val_path] if data.val_path else []
    if is_url(data.json_path):
        return [data.json_path], val
    path = Path(data.json_path).expanduser()
    if not path.exists():
        raise UserError(
            f"--data.json_path {data.json_path} does not exist. Give a file of records, or a "
            "folder with train and val files."
        )
    if path.is_file():
        return [path], val
    found = {kind: _named(path, names) for kind, names in (("train", TRAIN), ("val", VAL))}
    if not found["train"]:
        raise UserError(
            f"{path} has no file train.json, train.jsonl or train.parquet. Name a file, or call "
            "the files train and val."
        )
    return found["train"], val or found["val"]


def _named(folder: Path, stems: Sequence[str]) -> list[str | Path]:
    for stem in stems:
        files = [
            file
            for file in sorted(folder.iterdir())
            if file.name.partition(".")[0].lower() == stem and file.is_file()
        ]
        if files:
            return list(files)
    return []


def _hub_files(data: HubRecords) -> tuple[list[str | Path], list[str | Path]]:
    """The files of a set, fetched into `download_dir` unless they are there."""
    name = type(data).__name__.lower()
    if data.repo_id and data.repo_id != data.repo:  # files of the set's own repository are others
        name = data.repo_id.replace("/", "--")
    folder = Path(data.download_dir or f"data/{name}").expanduser()
    train, val = _patterns(data, data.train_files), _patterns(data, data.val_files)
    found = _matching(folder, train)
    lacking = [p for p in train if not _matching(folder, [p])] if isinstance(data, FLAN) else []
    unfinished = any((folder / STATE / "download").glob("*"))
    if not found or lacking or unfinished:
        repo = data.repo_id or data.repo
        try:
            download(
                Download(
                    repo_id=repo,
                    repo_type="dataset",
                    pattern=[*train, *val],
                    out_dir=str(folder),
                )
            )
        except (UserError, RunError) as error:
            raise type(error)(
                f"{error} Without the hub, put the files of {repo} into {folder}, or give records "
                "of your own: --data JSON --data.json_path FILE."
            ) from None
        found = _matching(folder, train)
    if not found:
        raise UserError(f"{folder} has none of {', '.join(train)}. Name another --data.repo_id.")
    return found, [file for file in _matching(folder, val) if file not in found]


def _patterns(data: HubRecords, patterns: Sequence[str]) -> list[str]:
    if not isinstance(data, FLAN):
        return list(patterns)
    subsets = [name.strip() for name in data.subsets.split(",")] if data.subsets else ["*"]
    return [pattern.format(subset=subset) for pattern in patterns for subset in subsets]


def _matching(folder: Path, patterns: Sequence[str]) -> list[str | Path]:
    """The files of the patterns, nested as on the hub or not; each once."""
    found: list[str | Path] = []
    for pattern in patterns:
        for place in (pattern, f"**/{PurePath(pattern).name}"):
            files = sorted(file for file in folder.glob(place) if _is_records(file, folder))
            found += [file for file in files if file not in found]
    return found


def _is_records(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    plain = file.name.removesuffix(".gz").removesuffix(".zst")
    if hidden or file.name == "dataset_infos.json":  # about a set of the hub, not of it
        return False
    return file.is_file() and PurePath(plain).suffix in SUFFIXES

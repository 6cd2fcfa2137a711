"""Checkpoint directories on disk: which are complete, whether they are intact, how they go.

    out_dir/step-00001000/
        weights/*.safetensors   optimizer/*.safetensors   config.json   tokenizer/
        checkpoint.json         written last: without it the directory is not a checkpoint

`checkpoint.json` holds the caller's record, the size and xxh3 digest of every other file, and
a digest of itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gristmill.util.errors import RunError

RECORD_NAME = "checkpoint.json"
FORMAT_VERSION = 1
# A checkpoint that replaces one of the same step is built under this suffix, then swapped in.
REPLACEMENT_SUFFIX = ".new"
READ_BYTES = 1 << 23

_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and xxh3 (128 bit, hexadecimal) of one file."""

    num_bytes: int
    xxh3: str


def say(line: str) -> None:
    """Print one line about a checkpoint on stderr; safe beside a live console."""
    sys.stderr.write(f"gristmill: {line}\n")


def step_path(out_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return Path(out_dir) / f"step-{step:08d}"


def step_of(path: str | Path) -> int:
    """The step of a checkpoint directory, from its name."""
    match = _STEP_NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step-00001000).")
    return int(match.group(1))


def is_step_name(name: str) -> bool:
    """Whether a directory is named like a checkpoint."""
    return _STEP_NAME.fullmatch(name) is not None


def complete(out_dir: str | Path) -> list[Path]:
    """Checkpoints of a run that were written to the end, newest first."""
    return [p for p in _step_dirs(out_dir) if (p / RECORD_NAME).is_file()]


def _step_dirs(out_dir: str | Path) -> list[Path]:
    root = Path(out_dir)
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def read_record(path: str | Path) -> dict[str, Any]:
    """What the run recorded with a checkpoint (samples, tokens, step, fingerprint, files, ...).

    Raises RunError when the record is missing, damaged, or of a later format.
    """
    file = Path(path) / RECORD_NAME
    try:
        record = json.loads(file.read_bytes())
        stated = record.pop("xxh3")
    except FileNotFoundError:
        raise RunError(
            f"{path} is not a complete checkpoint: it has no {RECORD_NAME}. "
            "Name a step-* directory that has one."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{file} is damaged. Go on from an earlier checkpoint.") from None
    if stated != _record_digest(record):
        raise RunError(f"{file} is damaged (wrong digest). Go on from an earlier checkpoint.")
    if record["format"] > FORMAT_VERSION:
        raise RunError(
            f"{file} has format {record['format']}; this version reads up to {FORMAT_VERSION}. "
            "Install a newer gristmill."
        )
    return dict(record)


def write_record(path: Path, record: dict[str, Any], files: dict[str, FileDigest]) -> None:
    """Make the directory a checkpoint: its record appears whole or not at all, and lasts."""
    body = {
        "format": FORMAT_VERSION,
        **record,
        "files": {
            name: {"bytes": digest.num_bytes, "xxh3": digest.xxh3}
            for name, digest in sorted(files.items())
        },
    }
    # Digest what a reader will parse: JSON turns tuples into lists and number keys into text.
    body = json.loads(json.dumps(body))
    temporary = path / f".{RECORD_NAME}.tmp"
    with temporary.open("w") as stream:
        json.dump({**body, "xxh3": _record_digest(body)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path / RECORD_NAME)
    sync_dir(path)
    sync_dir(path.parent)


def _record_digest(record: dict[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(canonical.encode()).hexdigest()


def verify(path: str | Path, part: int = 0, parts: int = 1) -> None:
    """Read every file of a checkpoint, or every `parts`-th, and compare it with its record.

    Raises RunError naming the first file that is missing, has another size, or another digest.
    """
    for name, stated in list(read_record(path)["files"].items())[part::parts]:
        check_file(Path(path) / name, FileDigest(stated["bytes"], stated["xxh3"]))


def check_file(file: Path, stated: FileDigest) -> None:
    """Read one file and compare it with its digest; RunError if it differs."""
    try:
        num_bytes = file.stat().st_size
        found = digest_file(file) if num_bytes == stated.num_bytes else None
    except OSError as error:
        raise RunError(
            f"{file} cannot be read ({error.strerror}). Go on from an earlier checkpoint."
        ) from error
    if found != stated:
        what = f"{num_bytes} bytes instead of {stated.num_bytes}" if found is None else "digest"
        raise RunError(f"{file} is damaged ({what}). Go on from an earlier checkpoint.")


def digest_file(file: Path) -> FileDigest:
    """Size and digest of a file."""
    hasher, num_bytes = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            hasher.update(block)
            num_bytes += len(block)
    return FileDigest(num_bytes, hasher.hexdigest())


def sync_dir(path: Path) -> None:
    """Make the entries of a directory last (a file's own fsync does not cover its name)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a checkpoint. Its record goes first, so that a half-deleted one never counts."""
    record = path / RECORD_NAME
    if record.is_file():
        record.unlink()
        sync_dir(path)
    shutil.rmtree(path)


def replacement_path(path: Path) -> Path:
    """Where a checkpoint is built that will take the place of `path`."""
    return path.with_name(path.name + REPLACEMENT_SUFFIX)


def promote(replacement: Path) -> Path:
    """Put a complete replacement in the place of the checkpoint of the same step."""
    path = replacement.with_name(replacement.name.removesuffix(REPLACEMENT_SUFFIX))
    if path.exists():
        remove(path)
    os.rename(replacement, path)
    sync_dir(path.parent)
    return path


def clean_partial(out_dir: str | Path) -> None:
    """Remove what killed saves and deletions left. Only for the run that holds the lock.

    A replacement that was complete but not yet swapped in takes its place.
    """
    root = Path(out_dir)
    for replacement in sorted(root.glob(f"step-*{REPLACEMENT_SUFFIX}")):
        if (replacement / RECORD_NAME).is_file():
            promote(replacement)
        else:
            remove(replacement)
    for path in _step_dirs(root):
        if not (path / RECORD_NAME).is_file():
            remove(path)


def discard_after(out_dir: str | Path, step: int) -> None:
    """Remove checkpoints later than `step`: a run that went back must not find them again."""
    for path in complete(out_dir):
        if step_of(path) > step:
            remove(path)

"""Token data that another tool wrote becomes a dataset: `gristmill data import`.

    find folders ──▶ pieces ──in place, linked or copied──▶ chunks ──▶ chunks.npy, manifest.json

A folder is a litdata token dataset or holds lit-llama's packed files. Several folders, such as the
one that each node of a cluster wrote, become one dataset, `train` and `val` one each, and each
corpus that the names of packed files tell apart. Nothing is encoded again; the manifest is written
last, and a killed import is finished by the same command.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from gristmill.config.data_commands import DataImport, listed
from gristmill.data.preparation import card
from gristmill.data.preparation.workspace import is_unfinished
from gristmill.data.storage import Storage, is_url
from gristmill.data.store import chunk_table, manifest, packed
from gristmill.data.store.chunk_table import ChunkTable
from gristmill.data.store.chunks import ChunkRecord, index_json, read_index, scan
from gristmill.data.store.dataset import Dataset, described
from gristmill.data.store.manifest import TokenizerRecord
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

MARK = ".import.json"
"""In the output until the whole import is done: from where."""

_SPLITS = ("train", "val")
_COPY_BYTES = 4 << 20
_REPORT_BYTES = 4 << 30
_SCANS = 16


@dataclass(frozen=True)
class _Source:
    """A folder that holds data; of packed files those of one corpus, or all of them."""

    folder: Path
    corpus: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Piece:
    """One file to be adopted, and the chunk that it becomes."""

    path: Path
    name: str
    dtype: str
    listed: dict[str, Any]
    """Its entry in litdata's index; empty for a packed file."""
    compressed: bool = False
    continues: bool = False
    packed: packed.PackedFile | None = None


def run(cfg: DataImport) -> None:
    """Adopt what the options name and print what there is now.

    Raises UserError for data that cannot be adopted, saying what is wrong with it.
    """
    given = listed(cfg.input_dir)
    if not given:
        raise UserError("name what to import. for example: gristmill data import LITDATA_FOLDER")
    for place in (*given, cfg.output_dir or ""):
        if is_url(place):
            raise UserError(f"{place} is not on this machine. copy it to a local folder first.")
    paths = [Path(path).expanduser() for path in given]
    out = Path(cfg.output_dir).expanduser() if cfg.output_dir else None
    if out is None and (cfg.copy or len(paths) > 1):
        what = "--copy" if cfg.copy else f"{len(paths)} folders"
        raise UserError(
            f"{what} needs a place for the dataset. name it with --output_dir OUT.",
            fix={"--output_dir": "OUT"},
        )
    tokenizer = Tokenizer.load(cfg.tokenizer_dir) if cfg.tokenizer_dir else None
    made: dict[str, Dataset] = {}
    for place, sources in _by_place(paths).items():
        base = (out or paths[0]) / place
        try:
            dataset = _import(base, sources, tokenizer, in_place=out is None, copy=cfg.copy)
        except UserError as error:
            if out is not None:
                error.fix.pop("--output_dir", None)
            raise
        except PermissionError as error:
            raise _not_writable(base, error, out) from error
        except OSError as error:
            raise RunError(
                f"cannot import into {base} ({error.strerror or error}). "
                "mend that and run the same command again: it goes on."
            ) from error
        how = "where it is" if out is None else "copied" if cfg.copy else "linked"
        print(
            f"{base}: {dataset.num_tokens:,} tokens ({dataset.dtype}) in "
            f"{_count(len(dataset.chunks), 'chunk')} from {_count(len(sources), 'folder')}, {how}"
        )
        made[place] = dataset
    for dataset in made.values():
        (dataset.storage.path / MARK).unlink(missing_ok=True)
    print(f"Next: gristmill pretrain MODEL {_as_data(out or paths[0], made)}")


def _as_data(base: Path, made: Mapping[str, Dataset]) -> str:
    """The options that train on what was imported: several corpora as a mixture."""
    tokens = {
        place.removesuffix("/train"): dataset.num_tokens
        for place, dataset in made.items()
        if place not in ("", *_SPLITS) and not place.endswith("/val")
    }
    if not tokens:
        return f"--data LitData --data.data_path {base}"
    sources = ", ".join(
        f"{{path: {json.dumps(str(base / name))}, weight: {weight:g}}}"
        for name, weight in packed.shares(tokens).items()
    )
    return f"--data Mixture --data.sources {shlex.quote(f'[{sources}]')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _by_place(paths: Sequence[Path]) -> dict[str, list[_Source]]:
    """What holds data, by the dataset's place in the output: a split, a corpus, or both."""
    splits = _by_split(paths)
    kinds = {
        (split, folder): {file.corpus for file in packed.find(folder)}
        for split, folders in splits.items()
        for folder in folders
        if not (folder / "index.json").is_file()
    }
    if len(set().union(*kinds.values())) < 2:
        return {split: [_Source(f) for f in folders] for split, folders in splits.items()}
    if len(kinds) < sum(map(len, splits.values())):
        raise UserError(
            "some of the folders hold packed files of several corpora, some litdata datasets. "
            "import them apart, each to its own --output_dir."
        )
    found: dict[str, list[_Source]] = {}
    for (split, folder), corpora in kinds.items():
        for name, side in sorted(corpora):
            place = f"{name}/{split or side}".strip("/")
            found.setdefault(place, []).append(_Source(folder, (name, side)))
    return found


def _by_split(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The folders that hold data, by the split that they belong to."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}. check the path.")
        splits = [name for name in _SPLITS if (path / name).is_dir()]
        for split in splits or [""]:
            groups.setdefault(split, []).extend(_data_folders(path / split))
    if "" in groups and len(groups) > 1:
        raise UserError(
            "some of the folders are parted into train and val, some are not. "
            "import them apart, each to its own --output_dir."
        )
    return groups


def _data_folders(path: Path) -> list[Path]:
    """The folders at or below `path` that hold a litdata dataset or packed files, sorted."""
    found, chunks = [], 0
    for here, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if is_unfinished(Path(here)):
            raise UserError(
                f"{here} is not finished. run the `gristmill prepare` command of it again."
            )
        if "index.json" in files:
            folders.clear()
            found.append(Path(here))
        elif packed.find(Path(here)):
            found.append(Path(here))
        else:
            chunks += sum(name.endswith(".bin") for name in files)
    if not found:
        unfinished = f"; {chunks:,} .bin files lie there, but litdata never finished them"
        raise UserError(
            f"{path} holds neither a litdata dataset (no index.json{unfinished if chunks else ''}) "
            "nor packed files (LITPKDS). check the path, or write the data again."
        )
    return sorted(found, key=lambda p: os.fsencode(p))


def _import(
    base: Path,
    sources: Sequence[_Source],
    tokenizer: Tokenizer | None,
    *,
    in_place: bool,
    copy: bool,
) -> Dataset:
    """Make `base` the dataset of what is in `sources`."""
    pieces = _pieces(sources, base if in_place else None, copy=copy)
    if (base / manifest.NAME).is_file():
        earlier = manifest.read(base)
        if not in_place and _is_begun(base, pieces, copy=copy):
            return Dataset.open(base)  # a kill came after it, before another one was done
        # An import in place can be repeated: data may have grown since.
        if not in_place or earlier.source is not None or earlier.whole_digests:
            raise UserError(f"{base} is a dataset already: it needs no import.")
    dtype = _one_type(pieces)
    if in_place:
        with ThreadPoolExecutor(_SCANS) as pool:
            records = list(pool.map(_scanned, pieces))
    else:
        _begin(base, pieces, copy=copy)
        records = _copied(base, pieces, dtype) if copy else list(_linked(base, pieces))
    table = ChunkTable.of(records)
    if not len(table):
        raise UserError(
            f"{sources[0].folder} holds no tokens for {base}. check the path, or move its empty "
            "files away."
        )
    keep_index = [source.folder for source in sources] == [base]
    _describe(base, table, dtype, tokenizer, whole=copy, keep_index=keep_index)
    return Dataset.open(base)


def _pieces(sources: Sequence[_Source], base: Path | None, *, copy: bool) -> list[_Piece]:
    """Every file of the folders. Their chunks are named from `base`, or else freshly."""
    pieces: list[_Piece] = []
    for number, source in enumerate(sources):
        mark = f"{number:05d}-" if len(sources) > 1 else ""
        found = (
            _litdata_pieces(source.folder, copy=copy)
            if (source.folder / "index.json").is_file()
            else _packed_pieces(source, copy=copy)
        )
        for piece in found:
            if base is not None:
                name = piece.path.relative_to(base).as_posix()
            else:
                name = mark + piece.name.replace("/", "-").replace(".zstd.bin", ".bin")
            pieces.append(dataclasses.replace(piece, name=name))
    if len({piece.name for piece in pieces}) < len(pieces):
        raise UserError(f"{sources[0].folder} names a chunk twice. write the data again.")
    return pieces


def _litdata_pieces(folder: Path, *, copy: bool) -> Iterator[_Piece]:
    index = read_index(folder)
    if index.compression and not copy:
        raise UserError(
            f"{folder} has compressed chunks ({index.compression}), which cannot be read where "
            "they are. unpack them into another folder with --copy --output_dir OUT.",
            fix={"--copy": "true", "--output_dir": "OUT"},
        )
    # Of a dataset of ours the index does not say where chunks cut documents.
    cut: set[str] = set()
    if (folder / manifest.NAME).is_file():
        cut = {chunk.name for chunk in Dataset.open(folder, check=False).chunks if chunk.continues}
    for entry in index.chunks:
        name = entry["filename"]
        yield _Piece(
            path=folder / name,
            name=name,
            dtype=index.dtype,
            listed=entry,
            compressed=bool(index.compression),
            continues=name in cut,
        )


def _packed_pieces(source: _Source, *, copy: bool) -> Iterator[_Piece]:
    if not copy:
        raise UserError(
            f"{source.folder} holds packed files (LITPKDS), which litdata cannot read. "
            "turn them into chunks in another folder with --copy --output_dir OUT.",
            fix={"--copy": "true", "--output_dir": "OUT"},
        )
    for file in packed.find(source.folder):
        if source.corpus in (None, file.corpus):
            yield _Piece(file.path, file.path.name, file.element, {}, packed=file)


def _one_type(pieces: Sequence[_Piece]) -> str:
    """The element type of all pieces; packed files are written in the widest that one needs."""
    if all(piece.packed for piece in pieces):
        return max((piece.dtype for piece in pieces), default="uint16")
    first = pieces[0]
    for piece in pieces:
        if piece.dtype != first.dtype:
            raise UserError(
                f"{piece.path.parent} has {piece.dtype} tokens, {first.path.parent} "
                f"{first.dtype}: a dataset has one type. import them apart, and mix them in "
                "training."
            )
    return first.dtype


def _scanned(piece: _Piece) -> ChunkRecord:
    record = scan(piece.path, piece.listed, piece.dtype)
    return dataclasses.replace(record, name=piece.name, continues=piece.continues)


def _job(pieces: Sequence[_Piece], *, copy: bool) -> str:
    """What the mark in the output says: these pieces, so."""
    sizes = [(str(p.path.resolve()), p.name, p.path.stat().st_size) for p in pieces]
    text = json.dumps({"copy": copy, "pieces": sizes})
    return json.dumps({"job": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()})


def _is_begun(base: Path, pieces: Sequence[_Piece], *, copy: bool) -> bool:
    """Whether an import of the same pieces was not done as a whole."""
    mark = base / MARK
    return mark.is_file() and mark.read_text(encoding="utf-8") == _job(pieces, copy=copy)


def _begin(base: Path, pieces: Sequence[_Piece], *, copy: bool) -> None:
    """Make the output, or find it as an earlier import of the same pieces left it."""
    if _is_begun(base, pieces, copy=copy):
        return
    if base.exists() and (not base.is_dir() or any(base.iterdir())):
        raise UserError(f"{base} is not empty. name another --output_dir, or remove it first.")
    base.mkdir(parents=True, exist_ok=True)
    needed, free = sum(p.path.stat().st_size for p in pieces) * copy, shutil.disk_usage(base).free
    if needed > free:
        raise RunError(
            f"no space left for {base}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are "
            "free. free some, or leave out --copy to link the chunks."
        )
    Storage(base).write(MARK, _job(pieces, copy=copy).encode())


def _linked(base: Path, pieces: Sequence[_Piece]) -> Iterator[ChunkRecord]:
    """Links to the pieces, which stay where they are."""
    with ThreadPoolExecutor(_SCANS) as pool:
        for piece, record in zip(pieces, pool.map(_scanned, pieces), strict=True):
            link = base / piece.name
            if not link.is_symlink():
                link.symlink_to(piece.path.resolve())
            yield record


def _copied(base: Path, pieces: Sequence[_Piece], dtype: str) -> list[ChunkRecord]:
    """The pieces as chunks of our own, unpacked where they are compressed or packed."""
    records: list[ChunkRecord] = []
    done, total, reported = 0, sum(piece.path.stat().st_size for piece in pieces), 0
    for piece in pieces:
        # Anew after a kill as well: reading what is there to digest it costs as much.
        target, scrap = base / piece.name, base / f".{piece.name}.tmp"
        try:
            if piece.packed is None:
                record: ChunkRecord | None = _copy(piece, scrap)
            else:
                record = packed.convert(piece.packed, scrap, dtype)
            if record is not None:
                os.replace(scrap, target)
                records.append(dataclasses.replace(record, name=piece.name))
            elif records:  # nothing but padding comes after the file before
                records[-1] = dataclasses.replace(records[-1], continues=False)
        finally:
            scrap.unlink(missing_ok=True)
        done += piece.path.stat().st_size
        if done - reported >= _REPORT_BYTES:
            reported = done
            print(f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB are copied", file=sys.stderr)
    return records


def _copy(piece: _Piece, target: Path) -> ChunkRecord:
    digest = xxhash.xxh3_128()
    with _opened(piece) as source, target.open("wb") as file:
        try:
            while data := source.read(_COPY_BYTES):
                digest.update(data)
                file.write(data)
        except (ValueError, EOFError, _zstandard_error()) as error:
            raise UserError(
                f"{piece.path} does not decompress ({error}). copy it again."
            ) from error
        file.flush()
        os.fsync(file.fileno())
    record = scan(target, piece.listed, piece.dtype)
    return dataclasses.replace(record, xxh3=digest.hexdigest(), continues=piece.continues)


def _opened(piece: _Piece) -> BinaryIO:
    if not piece.compressed:
        return piece.path.open("rb")
    import zstandard

    # Closes the file too. A chunk is one frame.
    return cast(BinaryIO, zstandard.open(piece.path, "rb"))


def _zstandard_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _describe(
    base: Path,
    table: ChunkTable,
    dtype: str,
    tokenizer: Tokenizer | None,
    *,
    whole: bool,
    keep_index: bool,
) -> None:
    """Write what makes the chunks in `base` a dataset, the manifest last."""
    contents = described(table, dtype, whole_digests=whole)
    if tokenizer is not None:
        _check_ids(Dataset(base, contents, table), tokenizer)
        made = TokenizerRecord(
            digest=tokenizer.digest, bos_id=None, eos_id=None, engine="", parity=""
        )
        contents = dataclasses.replace(
            contents, tokenizer=made, num_token_ids=tokenizer.num_token_ids
        )
    place = Storage(base)
    # An older manifest must not stand beside a newer table.
    place.remove(manifest.NAME)
    if tokenizer is not None:
        place.remove("tokenizer")
        tokenizer.save(base / "tokenizer")
    place.write(chunk_table.NAME, table.to_bytes())
    if not keep_index:
        longest = int(table.tokens.max())
        place.write("index.json", index_json(table, dtype, longest, contents.dataset_id).encode())
    if not place.exists(card.NAME):
        place.write(card.NAME, card.text(contents).encode())
    place.write(manifest.NAME, manifest.to_json(contents).encode())


def _check_ids(dataset: Dataset, tokenizer: Tokenizer) -> None:
    if (largest := dataset.largest_id()) >= tokenizer.num_token_ids:
        raise UserError(
            f"{dataset.path} holds the token id {largest}, above the largest of {tokenizer.path} "
            f"({tokenizer.num_token_ids - 1}): another tokenizer made it. name that one with "
            "--tokenizer_dir, or leave it out."
        )


def _not_writable(base: Path, error: OSError, out: Path | None) -> UserError:
    if out is not None:
        return UserError(f"{base} cannot be written ({error.strerror}). name another --output_dir.")
    return UserError(
        f"{base} cannot be written ({error.strerror}). name a folder for the manifest with "
        "--output_dir OUT: chunks are linked, not copied.",
        fix={"--output_dir": "OUT"},
    )

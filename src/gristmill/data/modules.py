"""Data modules: what `--data NAME` stands for, as prepared datasets.

Raw text is prepared into a cache beside it, one directory for each combination of inputs, options
and tokenizer. A changed file is another combination, hence prepared anew; an unchanged one is found
again, and an interrupted preparation goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gristmill.config.data import (
    DataModule,
    LitData,
    Mixture,
    RawText,
    Records,
    RedPajama,
    TextFiles,
)
from gristmill.data.preparation import summary
from gristmill.data.preparation.executors.local import available_cores
from gristmill.data.preparation.job import Executor, Job, recipe_for
from gristmill.data.preparation.plan import VERSION, Recipe, make_plan
from gristmill.data.preparation.workspace import Workspace, datasets_in
from gristmill.data.prepare import build
from gristmill.data.raw import first_use, layouts
from gristmill.data.raw.documents import Input
from gristmill.data.raw.inputs import CACHE, list_inputs, root_of
from gristmill.data.reading.corpus import CacheLimit, Corpus, LaterWeights, Part, name_of
from gristmill.data.storage import Storage, is_url
from gristmill.data.store import manifest, packed
from gristmill.data.store.dataset import Dataset
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError
from gristmill.util.paths import user_cache_dir

# Text that is too short to be split is trained on whole.
_SMALLEST_SPLIT_BYTES = 8192
# Options that a training command spells with `--data.` before them.
_OPTION = re.compile(r"--(pattern|text_field|separator|val_fraction|bos|eos|num_workers)\b")
# A folder of files is more mixed than a corpus: more of it may be something else than text.
_MAX_REJECT_FRACTION = 0.01


@dataclass(frozen=True)
class Datasets:
    """Prepared datasets, by directory or URL; `val` None when nothing is held out.

    `train` may be the parts of a mixture, with `later` weights, and `val` those of its parts that
    have a validation side. `limit` is that of the cache for what lies on object stores.
    """

    train: Path | str | tuple[Part, ...]
    val: Path | str | tuple[Part, ...] | None
    seed: int
    later: tuple[LaterWeights, ...] = ()
    limit: CacheLimit = CacheLimit()

    def train_corpus(self) -> Corpus:
        """What is trained on, opened."""
        return Corpus.open(_parts(self.train), later=self.later, limit=self.limit)

    def val_corpus(self) -> Corpus | None:
        """What is held out, opened."""
        if self.val is None:
            return None
        return Corpus.open(_parts(self.val), limit=self.limit, in_order=True)


def _parts(found: Path | str | tuple[Part, ...]) -> tuple[Part, ...]:
    return found if isinstance(found, tuple) else (Part(found),)


def open_datasets(
    data: DataModule, tokenizer_dir: Path | None, executor: Executor | None = None
) -> Datasets:
    """The datasets of a data module, raw text being prepared first where that is needed.

    By `executor`, unless the module names a number of processes; unset: by all cores of this
    machine.
    A module of the user's own gives them by its method `datasets(tokenizer_dir)`. Raises UserError
    for paths, options or text that cannot work.
    """
    if isinstance(data, RawText):
        return _raw(data, tokenizer_dir, executor)
    if isinstance(data, LitData):
        return _prepared(data)
    if isinstance(data, RedPajama):
        return _redpajama(data)
    if isinstance(data, Mixture):
        return _mixture(data)
    own = getattr(data, "datasets", None)
    if not callable(own):
        raise UserError(
            f"the data module {type(data).__name__} has no method datasets(tokenizer_dir). "
            "add it, returning gristmill.data.modules.Datasets."
        )
    found = own(tokenizer_dir)
    if not isinstance(found, Datasets):
        raise UserError(
            f"{type(data).__name__}.datasets gave a {type(found).__name__}. "
            "return gristmill.data.modules.Datasets(train, val, seed)."
        )
    return found


def _prepared(data: LitData) -> Datasets:
    limit = CacheLimit(data.cache_dir, data.cache_gb)
    if data.split_names is None:
        train, val = _sides(data.data_path)
        if data.val_data_path is not None:
            side, held = _sides(data.val_data_path)
            val = held or side
        if val == train:
            Dataset.open(train)  # a folder that is no dataset is the greater error
            raise UserError(
                f"{val} is the training data, too: nothing would be held out. name another "
                "--data.val_data_path, or leave it out."
            )
        return Datasets(train, val, data.seed, limit=limit)
    if data.val_data_path is not None:
        raise UserError(
            f"--data.split_names names the validation side {data.split_names[1]}, and "
            f"--data.val_data_path {data.val_data_path} another. leave one of them out."
        )
    train, val = (_place(Storage(data.data_path).below(name)) for name in data.split_names)
    for folder in (train, val):
        if isinstance(folder, Path) and not folder.is_dir():
            path = folder.parent
            there = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.exists() else []
            raise UserError(
                f"there is no folder {folder} (there: {', '.join(there) or 'none'}). "
                "give --data.split_names the names of the two folders."
            )
    return Datasets(train, val, data.seed, limit=limit)


def _sides(path: str) -> tuple[Path | str, Path | str | None]:
    """Training and validation dataset at `path`: its `train` and `val`, or itself and none."""
    storage = Storage(path)
    if storage.exists("index.json") or not storage.exists("train/index.json"):
        return _place(storage), None
    has_val = storage.exists("val/index.json")
    return _place(storage.below("train")), _place(storage.below("val")) if has_val else None


def _place(storage: Storage) -> Path | str:
    return storage.path if storage.is_local else storage.root


def _mixture(data: Mixture) -> Datasets:
    if not data.sources:
        raise UserError(
            "the mixture has no sources. give them: --data.sources '[{path: DATASET, weight: 1}]'"
        )
    train, val = [], []
    for source in data.sources:
        side, held_out = _sides(source.path)
        part = Part(side, source.weight, source.name or "", source.max_epochs)
        train.append(part)
        if held_out is not None:
            name = part.name or name_of(part.path)
            val.append(dataclasses.replace(part, path=held_out, name=name))
    names = [part.name or name_of(part.path) for part in train]
    if len(set(names)) < len(names):
        raise UserError(
            f"two sources have one name ({', '.join(names)}). give each a name: "
            "--data.sources '[{path: …, name: …}, …]'"
        )
    later = []
    for stage in data.stages:
        if strange := set(stage.weights) - set(names):
            raise UserError(
                f"the stage from {stage.from_tokens:g} tokens on names {', '.join(strange)}; the "
                f"sources are {', '.join(names)}. name those."
            )
        later.append(
            LaterWeights(stage.from_tokens, tuple(stage.weights.get(n, 0.0) for n in names))
        )
    limit = CacheLimit(data.cache_dir, data.cache_gb)
    return Datasets(tuple(train), tuple(val) or None, data.seed, tuple(later), limit)


def _redpajama(data: RedPajama) -> Datasets:
    train, val = _sets(data.data_path)
    if data.val_data_path is not None:
        side, held = _sets(data.val_data_path)
        val = held or side
    limit = CacheLimit(data.cache_dir, data.cache_gb)
    return Datasets(train, val or None, data.seed, limit=limit)


def _sets(path: str) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The prepared sets of RedPajama in a folder with their weights, and what they hold out."""
    storage, layout = Storage(path), layouts.get("redpajama")
    names = [*(layout.parts or {}), *(layout.sample_parts or {})]
    sides = {
        name: _sides(storage.at(name))
        for name in names
        if any(storage.exists(f"{name}/{index}index.json") for index in ("", "train/"))
    }
    if not sides:
        raise _no_sets(path, storage)
    weights = packed.shares({n: Dataset.open(train).num_tokens for n, (train, _) in sides.items()})
    parts = [Part(train, weights[name], name) for name, (train, _) in sides.items()]
    held = [dataclasses.replace(part, path=val) for part in parts if (val := sides[part.name][1])]
    return tuple(parts), tuple(held)


def _no_sets(path: str, storage: Storage) -> UserError:
    if storage.is_local and packed.find(storage.path):
        return UserError(
            f"{path} holds packed files (LITPKDS), which know nothing of documents. prepare the "
            "text again with `gristmill prepare redpajama`, or turn each set into a dataset: "
            f"gristmill data import {path} --copy --output_dir NEW, then --data RedPajama "
            "--data.data_path NEW."
        )
    names = ", ".join(layouts.get("redpajama").parts or {})
    return UserError(
        f"{path} holds no prepared set of RedPajama ({names}, …). prepare them: "
        "gristmill prepare redpajama --input_dir RAW --tokenizer_dir TOKENIZER "
        f"--output_dir {path}"
    )


def _raw(data: RawText, tokenizer_dir: Path | None, executor: Executor | None) -> Datasets:
    if tokenizer_dir is None:
        raise UserError("raw text needs a tokenizer. name its directory with --tokenizer_dir.")
    if data.num_workers != "auto" and data.num_workers < 1:
        raise UserError(
            f"--data.num_workers {data.num_workers} is too few. give 1 or more, or auto.",
            {"--data.num_workers": "auto"},
        )
    try:
        return _raw_datasets(data, tokenizer_dir, _executor(data, executor))
    except UserError as error:
        raise _in_training(error) from error


def _in_training(error: UserError) -> UserError:
    """An error of `prepare` with the options as a training command has them."""
    if (limit := "--max_reject_fraction") in error.fix:
        found = str(error).partition(", more than")[0]
        return UserError(
            f"{found}, more than {_MAX_REJECT_FRACTION:.0%}. mend or move them away, narrow "
            f"--data.pattern, or prepare the text with `gristmill prepare … {limit} "
            f"{error.fix[limit]}` and train on it as --data LitData."
        )
    fix = {_OPTION.sub(r"--data.\1", name): value for name, value in error.fix.items()}
    return UserError(_OPTION.sub(r"--data.\1", str(error)), fix)


def _executor(data: RawText, given: Executor | None) -> Executor:
    """Who prepares: what the user says of this machine comes first."""
    if not isinstance(data.num_workers, str):
        return data.num_workers
    return available_cores() if given is None else given


def _raw_datasets(data: RawText, tokenizer_dir: Path, executor: Executor) -> Datasets:
    tokenizer = Tokenizer.load(tokenizer_dir)
    train = _expanded(data.train_data_path)
    _check_fetched(data, train)
    if data.val_data_path is not None:
        val = _expanded(data.val_data_path)
        # Training text may be a folder that the validation text lies in.
        return Datasets(
            _cached(data, tokenizer, executor, train, 0.0, exclude=val),
            _cached(data, tokenizer, executor, val, 0.0),
            data.seed,
        )
    folder = _cached(data, tokenizer, executor, train, data.val_fraction)
    if (folder / "train").is_dir():
        return Datasets(folder / "train", folder / "val", data.seed)
    return Datasets(folder, None, data.seed)


def _expanded(path: str) -> str:
    return path if is_url(path) else str(Path(path).expanduser())


def _check_fetched(data: RawText, path: str) -> None:
    """Fetch a known corpus that is not at the place of its own; elsewhere, raise UserError."""
    layout = layouts.get(data.layout)
    if layout.fetch and path == getattr(type(data), "train_data_path", None):
        first_use.fetch(layout, Path(path))
    if layout.fetch and not is_url(path) and not Path(path).exists():
        raise UserError(
            f"there is no {path}. name the corpus with --data.train_data_path, or fetch it: "
            f"{layout.fetch} (docs/corpora/{layout.name}.md has the steps)."
        )


def _cached(
    data: RawText,
    tokenizer: Tokenizer,
    executor: Executor,
    path: str,
    fraction: float,
    exclude: str | None = None,
) -> Path:
    """The directory that holds `path` prepared."""
    inputs = _inputs(data, path, exclude)
    size = sum(item.size for item in inputs)
    if 0 < fraction < 1 and size < _SMALLEST_SPLIT_BYTES:
        print(f"{path} has {size:,} bytes: too few to hold some out for validation")
        fraction = 0.0
    recipe = _recipe(data, tokenizer, fraction)
    root = root_of(path)
    out = _cache_root(data, root) / _state(recipe, root, inputs)
    if _is_whole(out, recipe):
        print(f"using {path} as prepared before in {out}")
        return out
    files = summary.count(len(inputs), "file")
    print(f"preparing {path}: {files}, {size / 1e6:,.1f} MB", file=sys.stderr)
    started = time.monotonic()
    job = Job(
        recipe=recipe,
        root=root,
        inputs=inputs,
        out=Storage(out),
        tokenizer=tokenizer,
        executor=executor,
        max_reject_fraction=_MAX_REJECT_FRACTION,
    )
    made = build(make_plan(recipe, root, inputs), job)
    print(summary.text(job.out, made, time.monotonic() - started, following=False))
    return out


def _is_whole(out: Path, recipe: Recipe) -> bool:
    return (
        set(datasets_in(Storage(out))) == set(recipe.splits)
        and Workspace.open(Storage(out)).stored() is None
    )


def _recipe(data: RawText, tokenizer: Tokenizer, fraction: float) -> Recipe:
    return recipe_for(
        layouts.get(data.layout),
        tokenizer,
        text_field=data.text_field if isinstance(data, Records) else None,
        separator=data.separator if isinstance(data, TextFiles) else None,
        bos=data.bos,
        eos=data.eos,
        val_fraction=fraction,
        seed=data.seed,
    )


def _inputs(data: RawText, path: str, exclude: str | None) -> list[Input]:
    excluded = [p for p in (exclude, data.cache_dir) if p is not None]
    inputs = list_inputs(path, data.pattern, exclude=excluded)
    if exclude is not None and not is_url(exclude) and Path(exclude).is_file():
        root = root_of(path)
        held = Path(exclude).resolve()
        inputs = [i for i in inputs if not (root.is_local and _is(root, i, held))]
    if not inputs:
        raise UserError(f"{path} holds only the validation text. name other training text.")
    return inputs


def _is(root: Storage, item: Input, path: Path) -> bool:
    return (root.path / item.place).resolve() == path


def _cache_root(data: RawText, root: Storage) -> Path:
    """Where prepared text goes: as the user says, beside it, or into the user's cache."""
    if data.cache_dir is not None:
        folder = Path(data.cache_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if root.is_local:
        beside = root.path / CACHE
        try:
            beside.mkdir(exist_ok=True)
            if os.access(beside, os.W_OK):
                return beside
        except OSError:
            pass
    folder = user_cache_dir() / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _state(recipe: Recipe, root: Storage, inputs: Sequence[Input]) -> str:
    """Name for format, options and inputs as they are now, told without reading them.

    The time of a file's last change of any kind is among it, which nobody can set back.
    """
    where = str(root.path.resolve()) if root.is_local else root.root
    versions = [VERSION, manifest.VERSION]
    listed: list[object] = [versions, recipe.to_json(), where]
    for item in inputs:
        changed = (root.path / item.place).stat().st_ctime_ns if root.is_local else 0
        listed.append((item.path, item.size, item.version, changed))
    text = json.dumps(listed, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

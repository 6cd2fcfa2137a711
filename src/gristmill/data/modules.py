"""Data modules: what `--data NAME` stands for, as prepared datasets.

Raw text is prepared into a cache beside it, one directory for each combination of inputs, their
contents, options and tokenizer. A changed file is another combination, hence prepared anew; an
unchanged one is found again, and an interrupted preparation goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gristmill.config.data import DataModule, Jsonl, LitData, RawText, TextFiles
from gristmill.data import layouts, sources, summary
from gristmill.data.plan import Recipe, make_plan
from gristmill.data.prepare import Job, build, recipe_for
from gristmill.data.workspace import datasets_in, write_atomic
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError
from gristmill.util.paths import user_cache_dir

# Text that is too short to be split is trained on whole.
_SMALLEST_SPLIT_BYTES = 8192
# Options that a training command spells with `--data.` before them.
_OPTION = re.compile(r"--(pattern|text_field|separator|val_fraction|bos|eos|num_workers)\b")
# A folder of files is more mixed than a corpus: more of it may be something else than text.
_MAX_REJECT_FRACTION = 0.01
# A file that changed within this time of its listing may change again unnoticed.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Datasets:
    """Directories of prepared datasets; `val` None when nothing is held out."""

    train: Path
    val: Path | None
    seed: int


def open_datasets(data: DataModule, tokenizer_dir: Path | None) -> Datasets:
    """The datasets of a data module, raw text being prepared first where that is needed.

    A module of the user's own gives them by its method `datasets(tokenizer_dir)`. Raises UserError
    for paths, options or text that cannot work.
    """
    if isinstance(data, RawText):
        return _raw(data, tokenizer_dir)
    if isinstance(data, LitData):
        return _prepared(data)
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
    path = Path(data.data_path).expanduser()
    if data.split_names is not None:
        train, val = (path / name for name in data.split_names)
        for folder in (train, val):
            if not folder.is_dir():
                there = (
                    sorted(p.name for p in path.iterdir() if p.is_dir()) if path.exists() else []
                )
                raise UserError(
                    f"there is no folder {folder} (there: {', '.join(there) or 'none'}). "
                    "give --data.split_names the names of the two folders."
                )
        return Datasets(train, val, data.seed)
    if not (path / "index.json").is_file() and (path / "train").is_dir():
        val = path / "val"
        return Datasets(path / "train", val if val.is_dir() else None, data.seed)
    return Datasets(path, None, data.seed)


def _raw(data: RawText, tokenizer_dir: Path | None) -> Datasets:
    if tokenizer_dir is None:
        raise UserError("raw text needs a tokenizer. name its directory with --tokenizer_dir.")
    try:
        return _raw_datasets(data, tokenizer_dir)
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


def _raw_datasets(data: RawText, tokenizer_dir: Path) -> Datasets:
    tokenizer = Tokenizer.load(tokenizer_dir)
    train = Path(data.train_data_path).expanduser()
    if data.val_data_path is not None:
        val = Path(data.val_data_path).expanduser()
        # Training text may be a folder that the validation text lies in.
        return Datasets(
            _cached(data, tokenizer, train, 0.0, exclude=val),
            _cached(data, tokenizer, val, 0.0),
            data.seed,
        )
    folder = _cached(data, tokenizer, train, data.val_fraction)
    if (folder / "train").is_dir():
        return Datasets(folder / "train", folder / "val", data.seed)
    return Datasets(folder, None, data.seed)


def _cached(
    data: RawText, tokenizer: Tokenizer, path: Path, fraction: float, exclude: Path | None = None
) -> Path:
    """The directory that holds `path` prepared."""
    inputs = _inputs(data, path, exclude)
    size = sum(item.size for item in inputs)
    if 0 < fraction < 1 and size < _SMALLEST_SPLIT_BYTES:
        print(f"{path} has {size:,} bytes: too few to hold some out for validation")
        fraction = 0.0
    recipe = _recipe(data, tokenizer, fraction)
    root, cache = sources.root_of(path), _cache_root(data, path)
    state = _state(recipe, root, inputs)
    known = cache / "known" / state
    if known.is_file() and _is_whole(out := cache / known.read_text(), recipe):
        print(f"using {path} as prepared before in {out}")
        return out
    started = time.monotonic()
    settled = _are_settled(root, inputs)
    plan = make_plan(recipe, root, inputs)
    out = cache / plan.hash[:16]
    if _is_whole(out, recipe):
        print(f"using {path} as prepared before in {out}")
    else:
        print(f"preparing {path}: {len(inputs):,} files, {size / 1e6:,.1f} MB", file=sys.stderr)
        job = Job(
            recipe=recipe,
            root=root,
            inputs=inputs,
            out=out,
            tokenizer=tokenizer,
            num_workers=data.num_workers,
            max_reject_fraction=_MAX_REJECT_FRACTION,
        )
        made = build(plan, job)
        print(summary.text(out, made, time.monotonic() - started, following=False))
    if settled:
        known.parent.mkdir(exist_ok=True)
        write_atomic(known, out.name)
    return out


def _is_whole(out: Path, recipe: Recipe) -> bool:
    return set(datasets_in(out)) == set(recipe.splits)


def _recipe(data: RawText, tokenizer: Tokenizer, fraction: float) -> Recipe:
    return recipe_for(
        layouts.get("jsonl" if isinstance(data, Jsonl) else "textfiles"),
        tokenizer,
        text_field=data.text_field if isinstance(data, Jsonl) else "text",
        separator=data.separator if isinstance(data, TextFiles) else None,
        bos=data.bos,
        eos=data.eos,
        val_fraction=fraction,
        seed=data.seed,
    )


def _inputs(data: RawText, path: Path, exclude: Path | None) -> list[sources.Input]:
    pattern = data.pattern if isinstance(data, TextFiles | Jsonl) else "**/*"
    excluded = [Path(p) for p in (exclude, data.cache_dir) if p is not None]
    inputs = sources.list_inputs(path, pattern, exclude=excluded)
    if exclude is not None and exclude.is_file():
        root = sources.root_of(path)
        inputs = [i for i in inputs if (root / i.place).resolve() != exclude.resolve()]
    if not inputs:
        raise UserError(f"{path} holds only the validation text. name other training text.")
    return inputs


def _cache_root(data: RawText, path: Path) -> Path:
    """Where prepared text goes: as the user says, beside it, or into the user's cache."""
    if data.cache_dir is not None:
        root = Path(data.cache_dir).expanduser()
        root.mkdir(parents=True, exist_ok=True)
        return root
    beside = sources.root_of(path) / sources.CACHE
    try:
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK):
            return beside
    except OSError:
        pass
    root = user_cache_dir() / "datasets"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _state(recipe: Recipe, root: Path, inputs: list[sources.Input]) -> str:
    """Name for options and files as the file system shows them: what need not be read again."""
    listed: list[object] = [vars(recipe), str(root.resolve())]
    for item in inputs:
        status = (root / item.place).stat()
        listed.append(
            (item.path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        )
    text = json.dumps(listed, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _are_settled(root: Path, inputs: list[sources.Input]) -> bool:
    """Whether every later change of a file would show in `_state`, however quick it is."""
    newest = max((root / item.place).stat().st_ctime_ns for item in inputs)
    return newest + _SETTLED_NS < time.time_ns()

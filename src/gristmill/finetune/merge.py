"""The command `gristmill merge`: an adapter and its base as one ordinary model directory."""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import replace
from pathlib import Path

from gristmill.config.commands import Export
from gristmill.config.finetune import Merge
from gristmill.formats import litgpt_lora
from gristmill.formats.export import export
from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.source import ModelDir
from gristmill.util.errors import UserError
from gristmill.util.paths import resolve_model_dir

PRECISIONS = {"32-true": "float32", "bf16-true": "bfloat16", "16-true": "float16"}


def merge(cfg: Merge) -> None:
    """Write the merged model and say where it is; UserError where there is nothing to merge."""
    cfg = _one_type(cfg)
    if cfg.checkpoint_dir is None:
        raise UserError(
            "no adapter is named. Give its directory and where to write the merged model: "
            "gristmill merge out/run/final/adapter OUT"
        )
    place = resolve_model_dir(cfg.checkpoint_dir)
    source = open_model_dir(place, base=cfg.pretrained_checkpoint_dir)
    if source.base is None:
        _say_merged(place, source)
        return
    here = source.kind == "litgpt" and cfg.output_dir is None
    out = Path(cfg.output_dir) if cfg.output_dir else _beside(source.path)
    options = Export(
        checkpoint_dir=str(place),
        output_dir=str(out),
        format="litgpt" if here else cfg.format,
        dtype=cfg.dtype,  # type: ignore[arg-type]  # a part of what Export takes
        tokenizer_dir=cfg.tokenizer_dir,
        overwrite=cfg.overwrite,
    )
    if not here:
        export(options, source)
        return
    with contextlib.redirect_stdout(io.StringIO()):  # of a place where it will not stay
        export(options, source)
    _move_in(out, source.path)


def _one_type(cfg: Merge) -> Merge:
    if cfg.precision == "auto":
        return cfg
    if cfg.dtype != "auto":
        raise UserError(
            f"--dtype {cfg.dtype} and --precision {cfg.precision} both say the type of the "
            "weights. Give one of them.",
            {"--precision": None},
        )
    return replace(cfg, dtype=PRECISIONS[cfg.precision])  # type: ignore[arg-type]


def _say_merged(place: Path, source: ModelDir) -> None:
    """Say that there is nothing to do, or raise UserError where there never was an adapter."""
    adapter = source.path / "adapter"
    if adapter.is_dir() or (source.path / litgpt_lora.WEIGHTS).exists():
        print(f"{source.path} is merged already: use it as it is.")
        return
    raise UserError(
        f"{place} is a model and no adapter. Name a directory with adapter_config.json, a "
        "checkpoint of `gristmill finetune lora`, or one with lit_model.pth.lora."
    )


def _beside(path: Path) -> Path:
    """Where the merged model goes if nothing is said."""
    full = path.resolve()
    return full.with_name(f"merged-{full.name}")


def _move_in(out: Path, place: Path) -> None:
    """LitGPT merges into the adapter's own directory: what is not there yet goes there."""
    for file in sorted(out.iterdir(), key=lambda file: file.name == litgpt_lora.MERGED):
        if not (place / file.name).exists():
            file.rename(place / file.name)
        else:
            file.unlink()
    out.rmdir()
    merged = shlex.quote(str(place))
    print(
        f"{place / litgpt_lora.MERGED} is the merged model; every tensor was read back.\n"
        f"Use it: litgpt chat {merged}\n"
        f"        gristmill chat {merged}"
    )

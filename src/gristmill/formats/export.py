"""The command `gristmill export`: a model of any kind for other tools, compared with its source.

    open ─ check ─▶ write beside the target ─▶ read back and compare ─▶ rename into place

Parameters go through one at a time, so that memory holds about one tensor, whatever the model.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gristmill.config.commands import Convert, ConvertToLitgpt, Export
from gristmill.config.model import ModelConfig
from gristmill.formats.beside import beside, writing
from gristmill.formats.compare import compare_config, compare_weights
from gristmill.formats.litgpt import donor_note
from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.source import ModelDir
from gristmill.formats.tokenizer_files import find_tokenizer
from gristmill.models import zoo
from gristmill.models.counts import num_parameters, parameter_shapes
from gristmill.models.zoo.gguf import PROGRAM
from gristmill.models.zoo.listing import short
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import Interrupted, RunError, UserError
from gristmill.util.paths import resolve_model_dir

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LITGPT_FILES = ("lit_model.pth", "model_config.yaml")
MODEL_FILES = ("config.json", *LITGPT_FILES)
Q8_0_BYTES = 34 / 32
SPARE_BYTES = 64 << 20


def export(cfg: Export, source: ModelDir | None = None) -> None:
    """Write the model (`source` if it is open) and say where it is and how it is used.

    Raises UserError for what does not fit, before anything is written; RunError when the disk is
    full or what was written differs from its source, and then nothing of it is left.
    """
    job = _settle(cfg, source)
    print(job.opening(), file=sys.stderr)
    started = time.monotonic()
    with _failures(job.out, f"nothing is left of {job.out}"), beside(job.out) as place:
        _write(job, place.new)
        written_s = time.monotonic() - started
        _compare(job, place.new)
        place.finish()
    print(job.closing(written_s, time.monotonic() - started - written_s))


@contextlib.contextmanager
def _failures(place: Path, state: str) -> Iterator[None]:
    """Ctrl-C and a full disk in words; `state`: what is there afterwards."""
    try:
        with writing(place):
            yield
    except KeyboardInterrupt:
        raise Interrupted(2, f"stopped. {state}.") from None


def convert_from_litgpt(cfg: Convert) -> None:
    """`export --format hf` under LitGPT's name."""
    export(_spelled(cfg, "convert_from_litgpt", "hf"))


def convert_pretrained_checkpoint(cfg: Convert) -> None:
    """`export --format litgpt` under LitGPT's name: its next commands take the output."""
    export(_spelled(cfg, "convert_pretrained_checkpoint", "litgpt"))


def convert_to_litgpt(cfg: ConvertToLitgpt) -> None:
    """Add `lit_model.pth`, `model_config.yaml` and what else LitGPT looks for to a model directory.

    What is there stays as it is.
    """
    if cfg.checkpoint_dir is None:
        raise UserError("no model is named. Give its directory: gristmill convert_to_litgpt DIR")
    source = open_model_dir(cfg.checkpoint_dir)
    here = source.path
    if source.kind == "litgpt":
        print(f"{here} has LitGPT's files already.")
        return
    if source.kind != "huggingface":
        raise UserError(
            f"{here} is no directory that LitGPT's files could lie in. Write one of its own: "
            f"gristmill export {cfg.checkpoint_dir} OUT --format litgpt"
        )
    job = _settle(
        Export(
            checkpoint_dir=str(here),
            output_dir=str(here / "litgpt"),
            format="litgpt",
            dtype=cfg.dtype,
        )
    )
    if cfg.model_name is not None:
        job = replace(job, config=replace(job.config, name=cfg.model_name))
    with _failures(here, f"{here} is as it was"), beside(job.out) as place:
        _write(job, place.new)
        _compare(job, place.new)
        added = [p.name for p in place.new.iterdir() if not (here / p.name).exists()]
        # What makes it one of LitGPT's directories comes last.
        for name in sorted(added, key=lambda name: name == LITGPT_FILES[0]):
            (place.new / name).rename(here / name)
    print(
        f"{here}: {', '.join(sorted(added))} are written ({job.dtype}), every tensor is equal.\n"
        f"Use it: litgpt chat {here}\n"
        f"        gristmill chat {here}    (which needs no conversion)"
    )


@dataclass(frozen=True)
class _Job:
    """One export, with everything checked that can be before writing."""

    source: ModelDir
    out: Path
    format: str
    dtype: str
    config: ModelConfig
    max_shard_bytes: float
    tokenizer_dir: Path | None

    @property
    def torch_dtype(self) -> torch.dtype:
        """What parameters are cast to on their way; eight bits come from floats."""
        return DTYPES.get(self.dtype, torch.float32)

    @property
    def num_bytes(self) -> float:
        """Size of the weights."""
        width = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else Q8_0_BYTES
        return width * num_parameters(self.config)

    def opening(self) -> str:
        """What is about to be done."""
        note = donor_note(self.source)
        tokenizer = f"\nNote: {note}" if note else ""
        tokenizer += (
            ""
            if self.tokenizer_dir
            else (
                "\nNo tokenizer was found beside the model: its directory will have none "
                "(--tokenizer_dir DIR adds one)."
            )
        )
        return (
            f"{self.source.path} ({self.source.kind}, {self.config.name}, "
            f"{short(num_parameters(self.config))} parameters) to {self.out} "
            f"({self.format}, {self.dtype}, {_size(self.num_bytes)}){tokenizer}"
        )

    def closing(self, written_s: float, compared_s: float) -> str:
        """What was written, and the commands that use it."""
        files = [self.out] if self.out.is_file() else sorted(self.out.iterdir())
        total = sum(file.stat().st_size for file in files)
        equal = "is within the rounding of q8_0" if self.dtype == "q8_0" else "is equal bit for bit"
        lines = [
            f"{self.out}: {num_parameters(self.config):,} parameters as {self.dtype}, "
            f"{_size(total)} in {len(files)} file{'s' if len(files) > 1 else ''}:",
            *(f"  {file.name:<40} {_size(file.stat().st_size):>10}" for file in files),
            f"Read back: every tensor {equal}, the configuration means the same. "
            f"Written in {written_s:.1f} s, compared in {compared_s:.1f} s.",
            *(f"{'' if n else 'Use it:':<8} {line}" for n, line in enumerate(self.commands())),
        ]
        return "\n".join(lines)

    def commands(self) -> list[str]:
        """What people do next."""
        place = shlex.quote(str(self.out))
        ours = f"gristmill chat {place}"
        train = f"gristmill pretrain --initial_checkpoint_dir {place} --data … --out_dir NEW"
        if self.tokenizer_dir is None:
            ours = f"{train} --tokenizer_dir …"
        if self.format == "hf":
            return [ours, f"AutoModelForCausalLM.from_pretrained({str(self.out)!r})   (Python)"]
        if self.format == "litgpt":
            return [ours, f"litgpt chat {place}", train] if self.tokenizer_dir else [ours]
        file = self.out if self.out.suffix == ".gguf" else self.out / _gguf_name(self)
        return [f"{PROGRAM} -m {shlex.quote(str(file))}", ours]


def _settle(cfg: Export, source: ModelDir | None = None) -> _Job:
    """The export that the options mean. Raises UserError for what does not fit."""
    if cfg.checkpoint_dir is None or cfg.output_dir is None:
        raise UserError(
            "export takes a model and where to write it. "
            "Give both: gristmill export out/run OUT --format hf"
        )
    if cfg.format != "gguf" and cfg.output_dir.endswith(".gguf"):
        raise UserError(
            f"{cfg.output_dir} is the name of a GGUF file, but --format is {cfg.format}, which is "
            "a directory. Choose one of them.",
            {"--format": "gguf"},
        )
    if cfg.dtype == "q8_0" and cfg.format != "gguf":
        raise UserError(f"--dtype q8_0 is a type of GGUF files, not of {cfg.format}. Use bfloat16.")
    source = source or open_model_dir(cfg.checkpoint_dir, cfg.model_name)
    if source.config.adaption_prompt is not None:
        raise UserError(
            f"{source.path} is an adapter whose vectors are no part of any matrix, and other "
            "formats have no place for it. Use it as it is, with its base."
        )
    _check_name(cfg.model_name, source)
    out = Path(cfg.output_dir).expanduser()
    _check_target(out, source, cfg)
    tokenizer_dir = _tokenizer_dir(cfg, source)
    config = source.config
    if tokenizer_dir is not None:
        ids = Tokenizer.load(tokenizer_dir).num_token_ids
        if ids > config.vocab_size:
            raise UserError(
                f"the tokenizer in {tokenizer_dir} has ids up to {ids - 1:,}, the model "
                f"{config.vocab_size:,} rows. Give the one it was trained with: --tokenizer_dir"
            )
    if cfg.format == "hf":
        zoo.family(config.family).to_hf_config(config)  # says what it cannot express
    job = _Job(
        source,
        out,
        cfg.format,
        cfg.dtype if cfg.dtype != "auto" else _own_dtype(source),
        config,
        _bytes(cfg.max_shard_size),
        tokenizer_dir,
    )
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    needed = job.num_bytes + SPARE_BYTES
    if needed > free:
        raise RunError(
            f"no space left for {out}: {_size(needed)} are needed, {_size(free)} are free. "
            "Free some, choose a smaller --dtype, or write elsewhere."
        )
    return job


def _check_name(name: str | None, source: ModelDir) -> None:
    """UserError where the weights are of another architecture than the user says."""
    if name is None:
        return
    named, found = (dict(parameter_shapes(c)) for c in (zoo.get(name), source.config))
    for part in named.keys() | found.keys():
        if named.get(part) != found.get(part) and part not in ("embed.weight", "head.weight"):
            raise UserError(
                f"{source.path} is no {name} ({part} is {found.get(part)} there and "
                f"{named.get(part)} in {name}). Leave the name out: the files say what it is.",
                {"--model_name": None, "--config_name": None},
            )


def _check_target(out: Path, source: ModelDir, cfg: Export) -> None:
    """UserError where writing to `out` would lose something."""
    target, origin = out.resolve(), source.path.resolve()
    if target == origin or target in origin.parents:
        raise UserError(
            f"{out} is the model itself, or holds it. Write the export to another directory."
        )
    is_file = cfg.format == "gguf" and out.suffix == ".gguf"
    if not out.exists():
        return
    if out.is_file() and not is_file:
        raise UserError(f"{out} is a file. Name a directory.")
    if out.is_dir() and is_file:
        raise UserError(f"{out} is a directory. Name a file, or another directory.")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not cfg.overwrite:
        raise UserError(
            f"{out} is there already. Choose another place, or replace it with --overwrite true.",
            {"--overwrite": "true"},
        )
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    is_run = any(name == "run.yaml" or name.startswith("step-") for name in names)
    is_model = names & set(MODEL_FILES) or any(name.endswith(".gguf") for name in names)
    if is_run or not is_model:
        what = "a run" if is_run else "something other than a model"
        raise UserError(
            f"{out} holds {what}, which --overwrite would delete. Choose another directory."
        )


def _tokenizer_dir(cfg: Export, source: ModelDir) -> Path | None:
    """The tokenizer that goes along: the one named, or the model's own."""
    if cfg.tokenizer_dir is not None:
        return resolve_model_dir(cfg.tokenizer_dir)
    own = find_tokenizer(source)
    return None if own is None else own.path.parent


def _own_dtype(source: ModelDir) -> str:
    """The type of the source's weights, of which it may have several: that of the embedding."""
    own = str(source.parameters()["embed.weight"].dtype).removeprefix("torch.")
    if own not in DTYPES:
        raise UserError(f"{source.path} holds {own}. Choose --dtype {', '.join(DTYPES)}.")
    return own


def _write(job: _Job, place: Path) -> None:
    """The model in the format, at `place`."""
    parameters = _Fitting(job.source.parameters(), job.torch_dtype, _Live("written", job.config))
    if job.format == "hf":
        from gristmill.formats import hf

        hf.write(
            place,
            job.config,
            parameters,
            tokenizer_dir=job.tokenizer_dir,
            dtype=job.torch_dtype,
            max_shard_bytes=job.max_shard_bytes,
        )
    elif job.format == "litgpt":
        from gristmill.formats import litgpt

        litgpt.write(
            place,
            job.config,
            parameters,
            tokenizer_dir=job.tokenizer_dir,
            dtype=job.torch_dtype,
        )
    else:
        from gristmill.formats import gguf

        file = place
        if job.out.suffix != ".gguf":
            place.mkdir()
            file = place / _gguf_name(job)
        gguf.write(file, job.config, parameters, tokenizer_dir=job.tokenizer_dir, dtype=job.dtype)


def _compare(job: _Job, place: Path) -> None:
    """Read back what was written. Raises RunError naming what differs."""
    written = open_model_dir(place)
    compare_config(job.config, written.config)
    live = _Live("compared", job.config)
    compare_weights(
        _Fitting(job.source.parameters(), job.torch_dtype, live),
        written.parameters(),
        job.torch_dtype,
        rounded=job.dtype == "q8_0",
    )


def _gguf_name(job: _Job) -> str:
    name = job.config.name if job.config.name != ModelConfig.name else job.out.name
    return f"{name}-{job.dtype}.gguf"


class _Fitting(Mapping[str, Tensor]):
    """Parameters as they are asked for, counted, and refused where the type cannot hold them."""

    def __init__(
        self, parameters: Mapping[str, Tensor], dtype: torch.dtype, count: Callable[[int], None]
    ) -> None:
        self._parameters, self._dtype, self._count = parameters, dtype, count

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._parameters[name]
        largest = torch.finfo(self._dtype).max
        if self._dtype is torch.float16 and tensor.numel() and tensor.abs().max() > largest:
            raise UserError(
                f"{name} has values up to {tensor.abs().max():.3g}, and float16 ends at "
                f"{largest:.5g}. Use --dtype bfloat16 or float32."
            )
        self._count(tensor.numel())
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class _Live:
    """A line on a terminal that says how far it is; nothing elsewhere."""

    def __init__(self, verb: str, config: ModelConfig) -> None:
        self._verb, self._total, self._done = verb, num_parameters(config), 0
        self._shown = time.monotonic() if sys.stderr.isatty() else float("inf")

    def __call__(self, count: int) -> None:
        self._done += count
        share = min(1.0, self._done / self._total)
        if time.monotonic() - self._shown > 0.5 or (share == 1.0 and self._shown < float("inf")):
            self._shown = time.monotonic()
            text = f"{share:4.0%} {self._verb}" if share < 1.0 else ""
            print(f"\r{text:<20}", end="\r", file=sys.stderr, flush=True)


def _spelled(cfg: Convert, command: str, format: str) -> Export:
    if cfg.checkpoint_dir is None or cfg.output_dir is None:
        raise UserError(
            f"{command} takes a model and where to write it. Give both: gristmill {command} "
            "CHECKPOINT_DIR OUTPUT_DIR"
        )
    return Export(
        checkpoint_dir=cfg.checkpoint_dir,
        output_dir=cfg.output_dir,
        format="hf" if format == "hf" else "litgpt",
        dtype=cfg.dtype,
        tokenizer_dir=cfg.tokenizer_dir,
        model_name=cfg.model_name,
        overwrite=cfg.overwrite,
    )


def _bytes(text: str) -> float:
    """The number of bytes that a size such as 5GB, 500MB or 2GiB means."""
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "b": 1.0, "": 1.0}
    units |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
    word = text.strip().lower().replace("_", "")
    number = word.rstrip("kmgtib ")
    try:
        size = float(number) * units[word[len(number) :].strip()]
    except (ValueError, KeyError):
        size = 0.0
    if not size >= 1:
        raise UserError(f"--max_shard_size {text} is no size. Give one such as 5GB or 500MB.")
    return size


def _size(number: float) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= power:
            return f"{number / power:.2f} {unit}"
    return f"{number:.0f} bytes"

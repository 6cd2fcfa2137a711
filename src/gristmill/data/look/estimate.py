"""`gristmill data estimate`: how large a dataset will be, and how long it takes, from a sample."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gristmill.config.commands import Prepare
from gristmill.config.data_commands import DataEstimate
from gristmill.data.look import pieces
from gristmill.data.look.page import Page, columns, counted, percent, size
from gristmill.data.look.pieces import Piece
from gristmill.data.preparation.job import Job, jobs
from gristmill.data.preparation.plan import sample_texts, weight
from gristmill.data.preparation.progress import duration
from gristmill.data.preparation.units import UnitRecord, run_unit
from gristmill.data.raw import layouts, sources
from gristmill.data.storage import Storage
from gristmill.tokenizer.engines import EngineChoice, choose_engine, open_engine
from gristmill.util.errors import UserError

# A smaller sample takes no less time, as a person feels it.
_LEAST_BYTES = 16_000_000
# This much is read in a few seconds, and then nothing is left to guess.
_SMALL_BYTES = 64_000_000
# A file that cannot be read from the middle keeps no more processes busy (`plan.cut`).
_MOST_PARTS = 4
# How far from the mean 95 % of a normal distribution lie, in standard deviations.
_WITHIN = 1.96


@dataclass(frozen=True)
class Estimate:
    """What the preparation of some inputs would come to."""

    name: str
    """Name of the set where a layout has several."""
    files: int
    input_bytes: int
    read_bytes: int
    """Bytes of the input that the sample stands for."""
    places: int
    tokens: int
    tokens_error: float | None
    """Half the width of the interval that holds the truth in 95 of 100 cases, as a share of
    `tokens`; 0 when everything was read, None when too little was."""
    documents: int
    text_bytes: int
    dataset_bytes: int
    dtype: str
    seconds: float
    """Time on `num_workers` processes like this one."""
    num_workers: int
    engine: str
    rejects: dict[str, int]
    filtered: int
    empty_documents: int
    damaged: tuple[str, ...]
    """Damaged files that the sample met."""


def run(cfg: DataEstimate) -> None:
    """Print what the preparation would come to, for people or as JSON."""
    _check(cfg)
    with tempfile.TemporaryDirectory(prefix="gristmill-") as scratch:
        out = cfg.output_dir or str(Path(scratch) / "out")
        found = jobs(_prepare(cfg, out))
        estimates = [estimate(cfg, name, job, Path(scratch)) for name, job in found.items()]
    free = _free(cfg.output_dir)
    if cfg.json:
        value = {
            "estimates": [dataclasses.asdict(e) for e in estimates],
            "tokens": sum(e.tokens for e in estimates),
            "dataset_bytes": sum(e.dataset_bytes for e in estimates),
            "free_bytes": free,
        }
        print(json.dumps(value, indent=1))
        return
    _show(Page(), cfg, estimates, free)


def estimate(cfg: DataEstimate, name: str, job: Job, scratch: Path) -> Estimate:
    """Prepare a sample of a job's inputs, and reckon from it."""
    recipe, root, inputs = job.recipe, job.root, job.inputs
    engine = choose_engine(job.tokenizer, job.engine, sample_texts(recipe, root, inputs))
    total = sum(weight(item) for item in inputs)
    wanted = min(cfg.max_bytes, max(_LEAST_BYTES, int(total * cfg.fraction)))
    folder = Path(tempfile.mkdtemp(dir=scratch))
    if whole := total <= max(2 * wanted, _SMALL_BYTES):
        chosen = pieces.everything(recipe, root, inputs)
    else:
        chosen = pieces.spread(recipe, root, inputs, max(1, wanted // pieces.PLACES), folder)
    sample = _Sample(job, engine, folder)
    for piece in _shown(chosen, wanted, whole=whole):
        sample.take(piece)
    if not sample.records:
        raise UserError(
            f"nothing of the sample could be read ({', '.join(sample.damaged)} is damaged). "
            "fetch the files again, or narrow the pattern."
        )
    return sample.estimate(name, whole=whole)


@dataclass
class _Sample:
    """What the pieces read so far gave."""

    job: Job
    engine: EngineChoice
    folder: Path
    records: list[UnitRecord] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The engine as a worker has it."""
        self._encoder = open_engine(self.job.tokenizer, self.engine)

    def take(self, piece: Piece) -> None:
        """Prepare a piece into a folder that is thrown away."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            record = run_unit(
                piece.plan,
                0,
                piece.root,
                self._encoder,
                Path(out),
                lambda _: None,
                "quarantine",
            )
        if record.quarantined:
            self.damaged += [q.path for q in record.quarantined if q.path not in self.damaged]
            return
        self.records.append(record)
        self.sizes.append(piece.stands_for)
        self.seconds.append(max(0.0, time.perf_counter() - started - piece.overhead_s))

    def estimate(self, name: str, *, whole: bool) -> Estimate:
        """The whole, from the pieces: their mean per byte of input, times all bytes."""
        job, recipe = self.job, self.job.recipe
        total = sum(item.size for item in job.inputs)

        def reckoned(values: Sequence[float]) -> float:
            if whole:
                return float(sum(values))
            # Places were chosen by size: each says as much as any other.
            return total * statistics.fmean(v / s for v, s in zip(values, self.sizes, strict=True))

        tokens = [float(record.tokens) for record in self.records]
        documents = round(reckoned([record.documents for record in self.records]))
        if recipe.records == "text" and recipe.separator is None and not whole:
            documents = len(job.inputs)  # pieces of large files are no documents
        reasons = {reason for record in self.records for reason in record.rejects}
        rejects = Counter(
            {r: round(reckoned([rec.rejects.get(r, 0) for rec in self.records])) for r in reasons}
        )
        number = round(reckoned(tokens))
        workers = job.executor if isinstance(job.executor, int) else 1
        parted = any(sources.is_parted(recipe.format, item.place) for item in job.inputs)
        busy = workers if parted else min(workers, _MOST_PARTS * len(job.inputs))
        return Estimate(
            name=name,
            files=len(job.inputs),
            input_bytes=total,
            read_bytes=round(sum(self.sizes)),
            places=len(self.records),
            tokens=number,
            tokens_error=0.0 if whole else _error(tokens, self.sizes),
            documents=documents,
            text_bytes=round(reckoned([_text_bytes(record) for record in self.records])),
            dataset_bytes=number * np.dtype(recipe.dtype).itemsize + 4 * documents,
            dtype=recipe.dtype,
            seconds=reckoned(self.seconds) / busy,
            num_workers=workers,
            engine=f"{self.engine.name} {self.engine.version}",
            rejects=dict(sorted(rejects.items())),
            filtered=round(reckoned([record.filtered for record in self.records])),
            empty_documents=round(reckoned([rec.empty_documents for rec in self.records])),
            damaged=tuple(self.damaged),
        )


def _text_bytes(record: UnitRecord) -> int:
    return sum(split.text_bytes for split in record.splits)


def _error(values: Sequence[float], sizes: Sequence[float]) -> float | None:
    """The 95 % interval of the mean of values per size, as a share of it."""
    if len(values) < 4:
        return None
    rates = [value / size_ for value, size_ in zip(values, sizes, strict=True)]
    mean = statistics.fmean(rates)
    half = _WITHIN * statistics.stdev(rates) / float(len(rates)) ** 0.5
    return half / mean if mean else None


def _shown(chosen: Iterator[Piece], wanted: int, *, whole: bool) -> Iterator[Piece]:
    """The pieces until enough text is read, with a word on a terminal of how far it is."""
    shown = sys.stderr.isatty()
    read = 0
    for piece in chosen:
        if shown:
            print(f"\rreading the sample: {read / 1e6:,.0f} MB", end="", file=sys.stderr)
        yield piece
        read += piece.plan.text_bytes(0)
        # Forms that only can be read whole make large pieces.
        if not whole and read > 2 * wanted:
            break
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _check(cfg: DataEstimate) -> None:
    if not 0 < cfg.fraction <= 1:
        raise UserError(
            f"--fraction {cfg.fraction} is no share of the text. give 0.01, or up to 1."
        )
    if cfg.max_bytes < 1:
        raise UserError(f"--max_bytes {cfg.max_bytes} reads nothing. give 1 or more.")
    for option in ("layout", "input_dir", "tokenizer_dir"):
        if getattr(cfg, option) is None:
            raise UserError(
                f"--{option} is missing. for example: gristmill data estimate jsonl "
                "--input_dir TEXT --tokenizer_dir TOKENIZER"
            )


def _prepare(cfg: DataEstimate, out: str) -> Prepare:
    """The preparation that is estimated."""
    same = {f.name for f in dataclasses.fields(Prepare)} & {f.name for f in dataclasses.fields(cfg)}
    layouts.get(cfg.layout or "")
    return Prepare(**{name: getattr(cfg, name) for name in same} | {"output_dir": out})


def _free(output_dir: str | None) -> int | None:
    """Bytes that are free where the dataset will go; None when that is not known."""
    import shutil

    if output_dir is None or not Storage(output_dir).is_local:
        return None
    path = Path(output_dir).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _show(page: Page, cfg: DataEstimate, estimates: Sequence[Estimate], free: int | None) -> None:
    for number, found in enumerate(estimates):
        if number:
            page.line()
        _show_one(page, cfg, found)
    if len(estimates) > 1:
        rows = [("together", "tokens", "dataset", "time")]
        for found in estimates:
            rows.append(
                (found.name, f"{found.tokens:,}", size(found.dataset_bytes), _time(found.seconds))
            )
        seconds = sum(found.seconds for found in estimates)
        tokens = sum(found.tokens for found in estimates)
        stored = sum(found.dataset_bytes for found in estimates)
        rows.append(("", f"{tokens:,}", size(stored), _time(seconds)))
        page.line()
        head, *lines, last = columns(rows)
        page.line((head, "dim"))
        for line in lines:
            page.line(line)
        page.line((last, "bold"))
    needed = sum(found.dataset_bytes for found in estimates)
    if free is not None:
        page.line()
        if needed > free:
            page.line(
                ("too little room", "bold red"),
                f": {size(free)} are free for {cfg.output_dir}, {size(needed)} are needed. free "
                "some, or name another --output_dir.",
            )
        else:
            page.line(f"room enough: {size(free)} are free for {cfg.output_dir}")


def _show_one(page: Page, cfg: DataEstimate, found: Estimate) -> None:
    name = f" {found.name}" if found.name else ""
    page.line(
        (f"{cfg.layout}{name}", "bold"),
        f": {counted(found.files, 'file')} of {size(found.input_bytes)} in {cfg.input_dir}",
    )
    if found.tokens_error == 0:
        page.line(("  all of it was read: the numbers are exact", "dim"))
    else:
        share = percent(found.read_bytes / max(1, found.input_bytes))
        page.line((f"  from {share} of it, in {counted(found.places, 'place')}", "dim"))
    if found.tokens_error is None:
        error = " (too few places to say how exact)"
    else:
        error = f" ± {percent(found.tokens_error)}" if found.tokens_error else ""
    per_token = found.text_bytes / max(1, found.tokens)
    rows: list[tuple[str, str]] = [
        ("tokens", f"{found.tokens:,}{error}"),
        ("documents", f"{found.documents:,}"),
        ("text", f"{size(found.text_bytes)}, {per_token:.2f} bytes per token"),
        ("dataset", f"{size(found.dataset_bytes)} ({found.dtype})"),
        ("time", f"{_time(found.seconds)} with {_workers(found)}, encoding with {found.engine}"),
    ]
    left = [f"{number:,} {reason}" for reason, number in found.rejects.items()]
    left += [f"{found.filtered:,} filtered"] if found.filtered else []
    left += [f"{found.empty_documents:,} without text"] if found.empty_documents else []
    if left:
        rows.append(("left out", ", ".join(left)))
    if found.damaged:
        rows.append(("damaged", ", ".join(found.damaged[:5]) + " …" * (len(found.damaged) > 5)))
    for title, text in rows:
        page.line((f"  {title:<11}", "dim"), text)


def _workers(found: Estimate) -> str:
    return counted(found.num_workers, "process").replace("processs", "processes")


def _time(seconds: float) -> str:
    return "under a second" if seconds < 0.5 else f"about {duration(seconds)}"

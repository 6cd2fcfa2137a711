"""Speed and memory of preparation, beside LitGPT, litdata, and the engines by themselves.

    python benchmarks/prepare.py --tokenizer_dir NEOX --text TEXT.jsonl.zst --peer_python PYTHON

The text is multiplied, its paragraphs in another order each time, into shards of .jsonl.zst and
into plain .txt files. In each round, in turns:

    ours          the command `gristmill prepare`, from a shell's point of view, on --megabytes
    litgpt        TextFiles of LitGPT, as many processes, on --peer_megabytes of .txt
    litdata       litdata's optimize around `tokenizers`, likewise, on .jsonl.zst
    tokenizers    the definition by itself, text in memory, as many processes
    fastokens     the engine by itself, likewise

Then, with --steady_megabytes (2,000 for the real thing), the long run: its time less that of a tiny
folder, from .jsonl.zst and from .txt, beside the bare engine; and a folder of 40 MB. Peers are
LitGPT 0.5.13 and litdata 0.2.76 in an environment of their own (see README.md).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
import zstandard
from _common import (
    IN_PROCESS,
    environment,
    high_water,
    print_table,
    run_child,
    spread,
    versions,
)

from gristmill.data.store.manifest import read
from gristmill.tokenizer.engines import single_thread_env

SHARD_BYTES = 25_000_000
FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class Figure:
    """One measured run."""

    tokens: int
    seconds: float
    peak_bytes: int = 0
    """Largest resident memory of any process of ours."""

    @property
    def mtok_per_s(self) -> float:
        """Millions of tokens per second."""
        return self.tokens / self.seconds / 1e6


def main() -> None:
    """Measure, print the tables and the JSON line."""
    args = parse_arguments()
    work = Path(args.work_dir or tempfile.mkdtemp(prefix="prepare-"))
    big = corpus(work / "big", args.text, args.megabytes)
    small = corpus(work / "small", args.text, args.peer_megabytes)
    gristmill(args, work, "jsonl", small / "jsonl", "warm")  # parity verdict, file caches
    sides: dict[str, Callable[[], Figure]] = {
        "ours": lambda: gristmill(args, work, "jsonl", big / "jsonl", "ours"),
        "fastokens": lambda: bare(args, "fastokens", big / "jsonl"),
        "tokenizers": lambda: bare(args, "tokenizers", small / "jsonl"),
    }
    if args.peer_python:
        for name, script, folder in (
            ("litgpt", "litgpt_text_files.py", small / "txt"),
            ("litdata", "litdata_optimize.py", small / "jsonl"),
        ):
            sides[name] = lambda s=script, f=folder: peer(args, work, s, f)  # type: ignore[misc]
    figures: dict[str, list[Figure]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, run in sides.items():
            figures[name].append(run())
            print(f"round {number + 1} {name}: {shown(figures[name][-1])}", file=sys.stderr)
    report(args, figures, steady(args, work) if args.steady_megabytes else {})
    if not args.work_dir:
        shutil.rmtree(work)


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer_dir", required=True, help="with tokenizer.json (GPT-NeoX)")
    parser.add_argument("--text", required=True, help=".jsonl.zst with a field `text`")
    parser.add_argument("--peer_python", help="interpreter of an environment with the peers")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--peer_megabytes", type=int, default=20)
    parser.add_argument("--steady_megabytes", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work_dir", help="where corpora and datasets go, and stay")
    return parser.parse_args()


def corpus(folder: Path, text: str, megabytes: int) -> Path:
    """`jsonl/*.jsonl.zst` and `txt/*.txt` with about so much text each, made once."""
    if (folder / "done").exists():
        return folder
    for name in ("jsonl", "txt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = list(records(Path(text)))
    shard, file, total, number = [], [], 0, 0  # type: list[bytes], list[str], int, int
    shard_size = file_size = 0
    while total < megabytes * 1_000_000:
        for document in shuffled(source, number):
            size = len(document.encode())
            shard.append(orjson.dumps({"text": document, "meta": {"copy": number}}))
            file.append(document)
            shard_size, file_size, total = shard_size + size, file_size + size, total + size
            if shard_size > SHARD_BYTES:
                write_shard(folder / "jsonl", shard)
                shard, shard_size = [], 0
            if file_size > FILE_BYTES:
                write_file(folder / "txt", file)
                file, file_size = [], 0
            if total >= megabytes * 1_000_000:
                break
        number += 1
    if shard:
        write_shard(folder / "jsonl", shard)
    write_file(folder / "txt", file)
    (folder / "done").touch()
    return folder


def records(path: Path) -> Iterator[str]:
    """The texts of a .jsonl.zst file."""
    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw)
        for line in io.BufferedReader(stream):  # type: ignore[arg-type]
            yield orjson.loads(line)["text"]


def shuffled(texts: list[str], seed: int) -> Iterator[str]:
    """The texts in another order, and the paragraphs of each; as they are for seed 0."""
    chosen = random.Random(seed)
    order = list(range(len(texts)))
    if seed:
        chosen.shuffle(order)
    for index in order:
        paragraphs = texts[index].split("\n")
        if seed:
            chosen.shuffle(paragraphs)
        yield "\n".join(paragraphs)


def write_shard(folder: Path, lines: list[bytes]) -> None:
    """One file of compressed JSON lines."""
    path = folder / f"part-{len(list(folder.iterdir())):05}.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress(b"\n".join(lines) + b"\n"))


def write_file(folder: Path, texts: list[str]) -> None:
    """One plain text file."""
    (folder / f"part-{len(list(folder.iterdir())):06}.txt").write_text("\n\n".join(texts))


def gristmill(args: argparse.Namespace, work: Path, layout: str, folder: Path, name: str) -> Figure:
    """The command, from its start to its end."""
    out = work / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "gristmill", "prepare", layout, "--input_dir", str(folder)]
    words += ["--output_dir", str(out), "--tokenizer_dir", args.tokenizer_dir]
    words += ["--num_workers", str(args.workers), "--engine", "fastokens"]
    began = time.perf_counter()
    process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for one in (process, *children(process)):
            peaks[one.pid] = max(peaks.get(one.pid, 0), high_water(one.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    tokens = read(out).totals.tokens
    shutil.rmtree(out)
    return Figure(tokens, seconds, max(peaks.values()))


def children(process: psutil.Process) -> list[psutil.Process]:
    """The processes below one, none when it has just ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def bare(args: argparse.Namespace, engine: str, folder: Path) -> Figure:
    """An engine alone: processes with the text in memory, begun together, timed by themselves."""
    one_thread = single_thread_env()
    tokenizer = f"{args.tokenizer_dir}/tokenizer.json"
    script = [sys.executable, str(IN_PROCESS / "bare_engine.py"), engine, tokenizer, str(folder)]
    processes = [
        subprocess.Popen(
            [*script, str(part), str(args.workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread},
            text=True,
        )
        for part in range(args.workers)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    # All at once: the slowest ends the run, as it does for us.
    outputs = [(p.stdin.write("\n"), p.stdin.flush(), p) for p in processes]  # type: ignore[union-attr]
    results = [json.loads(p.communicate()[0]) for *_, p in outputs]
    return Figure(sum(r["tokens"] for r in results), max(r["seconds"] for r in results))


def peer(args: argparse.Namespace, work: Path, script: str, folder: Path) -> Figure:
    """A peer's own preparation, timed inside its process: its imports are not counted."""
    out, log = work / "out-peer", work / "logs" / f"{script}.txt"
    shutil.rmtree(out, ignore_errors=True)
    words = [str(IN_PROCESS / script), args.tokenizer_dir, str(folder), str(out)]
    # Its own thread pools are left as they are: that is what its users run.
    run_child([args.peer_python, *words, str(args.workers)], log)
    printed = [line for line in log.read_text().splitlines() if line.startswith('{"seconds"')]
    index = json.loads((out / "index.json").read_text())
    shutil.rmtree(out)
    return Figure(sum(c["dim"] for c in index["chunks"]), json.loads(printed[-1])["seconds"])


def steady(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """The long run, start-up apart, as a share of the bare engine; and a folder of 40 MB."""
    huge = corpus(work / "huge", args.text, args.steady_megabytes)
    forty = corpus(work / "forty", args.text, 40)
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        engine = bare(args, "fastokens", corpus(work / "big", args.text, args.megabytes) / "jsonl")
        for layout, kind in (("jsonl", "jsonl"), ("textfiles", "txt")):
            tiny = gristmill(args, work, layout, one_file(work, kind, huge / kind), "tiny")
            long = gristmill(args, work, layout, huge / kind, "long")
            steady = Figure(long.tokens, long.seconds - tiny.seconds)
            for name, value in {
                "startup_s": tiny.seconds,
                "mtok_per_s": steady.mtok_per_s,
                "of_engine": steady.mtok_per_s / engine.mtok_per_s,
                "peak_mb": long.peak_bytes / 1e6,
            }.items():
                found.setdefault(f"steady_{kind}_{name}", []).append(value)
            forty_run = gristmill(args, work, layout, forty / kind, "forty")
            found.setdefault(f"forty_mb_{kind}_s", []).append(forty_run.seconds)
        print({name: round(values[-1], 2) for name, values in found.items()}, file=sys.stderr)
    return {name: statistics.median(values) for name, values in found.items()}


def one_file(work: Path, kind: str, folder: Path) -> Path:
    """A folder with hardly any text, in the form of the files in `folder`."""
    tiny = work / f"tiny-{kind}"
    tiny.mkdir(exist_ok=True)
    if kind == "txt":
        (tiny / "a.txt").write_text("A short text.\n")
    else:
        data = zstandard.ZstdCompressor().compress(b'{"text": "A short text."}\n')
        (tiny / "a.jsonl.zst").write_bytes(data)
    return tiny


def shown(figure: Figure) -> str:
    """A figure for people."""
    peak = f", {figure.peak_bytes / 1e6:,.0f} MB" if figure.peak_bytes else ""
    return f"{figure.mtok_per_s:.2f} Mtok/s ({figure.seconds:.1f} s{peak})"


def report(
    args: argparse.Namespace, figures: dict[str, list[Figure]], long: dict[str, float]
) -> None:
    """The table and the JSON line."""
    rows, summary = [], {}
    for name, runs in figures.items():
        speed = spread([run.mtok_per_s for run in runs])
        ratios = spread(
            [ours.mtok_per_s / run.mtok_per_s for ours, run in zip(figures["ours"], runs)]
        )
        summary[name] = {"mtok_per_s": speed, "ours_over_it": ratios}
        rows.append([name, f"{speed['median']:.2f}", f"{ratios['median']:.2f}"])
    print_table(["", "Mtok/s", "ours / it"], rows)
    for name, value in long.items():
        print(f"{name:28} {value:8.2f}")
    peak = max(run.peak_bytes for run in figures["ours"])
    print(f"largest process of ours: {peak / 1e6:,.0f} MB")
    packages = versions(sys.executable, ["gristmill", "fastokens", "tokenizers"])
    line = {
        "benchmark": "prepare",
        **environment(args.workers),
        **packages,
        "megabytes": args.megabytes,
        "rounds": args.rounds,
        "sides": summary,
        "steady": long,
        "peak_bytes": peak,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

"""What the order of samples costs, and how far reading is ahead of training and of litdata.

    python benchmarks/stream.py --tokenizer_dir TOKENIZER --text TEXT.jsonl.zst --peer_python PEER

1. A simulated dataset of 10^13 tokens (600,000 chunks, the table only) is opened and any sample of
   it sought, in a process of its own: time and memory. Then the cost of locating one sample.
2. Batches of a real dataset are read from local disk, by us and by litdata's StreamingDataLoader
   (0 and 2 workers, the faster counts), in turns, and a pythia-14m run's own data wait is taken
   from its metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import (
    IN_PROCESS,
    environment,
    gristmill,
    high_water,
    print_table,
    run_child,
    spread,
    versions,
)

TOKENS = 10**13
CHUNK_TOKENS = 2**24
SEQ_LEN, BATCH = 2048, 8


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parse_arguments()
    if args.simulated:
        print(json.dumps(seek(Path(args.simulated))))
        return
    work = Path(args.work_dir or tempfile.mkdtemp(prefix="stream-"))
    order = simulated(work)
    reading = read_in_turns(args, work) if args.text else {}
    report(args, order, reading)
    if not args.work_dir:
        shutil.rmtree(work)


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", help=".jsonl.zst file; without it only the order is measured")
    parser.add_argument("--tokenizer_dir", help="tokenizer for the text")
    parser.add_argument("--peer_python", help="interpreter of an environment with litdata")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--work_dir", help="where datasets and runs go, and stay")
    parser.add_argument("--simulated", help=argparse.SUPPRESS)
    return parser.parse_args()


def simulated(work: Path) -> dict[str, float]:
    """Figures of a process that opens the simulated dataset and seeks in it."""
    folder = work / "simulated"
    if not (folder / "manifest.json").exists():
        make_simulated(folder)
    out = subprocess.run(
        [sys.executable, __file__, "--simulated", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def make_simulated(folder: Path) -> None:
    """A manifest and a table of chunks that are not there."""
    import numpy as np

    from gristmill.data.store import manifest
    from gristmill.data.store.chunk_table import NAME, TableBuilder
    from gristmill.data.store.chunks import ChunkRecord
    from gristmill.data.store.dataset import described

    folder.mkdir(parents=True)
    builder = TableBuilder()
    ragged = np.random.default_rng(0).integers(CHUNK_TOKENS // 2, CHUNK_TOKENS, 2 * 10**6)
    for number in range(int(np.searchsorted(np.cumsum(ragged), TOKENS)) + 1):
        tokens = int(ragged[number])
        name = f"chunk-{number:07d}-0.bin"
        builder.add(ChunkRecord(name, tokens, 10_000, 2 * tokens + 40_008, f"{number:032x}"))
    table = builder.table()
    (folder / NAME).write_bytes(table.to_bytes())
    contents = manifest.to_json(described(table, "uint16", whole_digests=True))
    (folder / "manifest.json").write_text(contents)


def seek(folder: Path) -> dict[str, float]:
    """Open, seek to samples far apart, and locate many; run in a process of its own."""
    import numpy as np

    from gristmill.data.reading.order import Order, samples_per_chunk
    from gristmill.data.store.dataset import Dataset

    began = time.perf_counter()
    dataset = Dataset.open(folder)
    order = Order(samples_per_chunk(dataset.chunk_tokens, SEQ_LEN), seed=1)
    order.locate(np.array([order.num_samples // 3], dtype=np.int64))
    opened = time.perf_counter() - began
    began = time.perf_counter()
    order.locate(np.array([2 * order.num_samples + 12345], dtype=np.int64))
    sought = time.perf_counter() - began
    costs = []
    for start in range(0, 1_000_000, 10_000):
        began = time.perf_counter()
        order.locate(np.arange(start, start + 1024, dtype=np.int64))
        costs.append((time.perf_counter() - began) / 1024)
    return {
        "tokens": float(dataset.num_tokens),
        "chunks": float(len(dataset.chunks)),
        "open_and_seek_s": opened,
        "seek_s": sought,
        "locate_us_per_sample": statistics.median(costs) * 1e6,
        "peak_mb": high_water(os.getpid()) / 1e6,
    }


def read_in_turns(args: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """Tokens per second of us and of litdata, and the data wait of a training run."""
    dataset = work / "dataset"
    if not dataset.exists():
        words = ["jsonl", "--input_dir", args.text, "--output_dir", str(dataset)]
        words += ["--tokenizer_dir", args.tokenizer_dir]
        run_child(gristmill("prepare", *words), work / "logs/prepare.txt")
    found: dict[str, list[float]] = {"ours": []}
    for _ in range(args.rounds):
        found["ours"].append(read_ours(dataset, args.batches))
        for workers in (0, 2) if args.peer_python else ():
            speed = read_peer(args, work, dataset, workers)
            found.setdefault(f"litdata, {workers} workers", []).append(speed)
    found["share of the step spent waiting for data"] = data_wait(work, dataset)
    return found


def read_ours(dataset: Path, batches: int) -> float:
    """Tokens per second of our stream, in this process, nothing else going on."""
    from gristmill.data.reading.stream import TokenStream
    from gristmill.data.store.dataset import Dataset

    stream = TokenStream(Dataset.open(dataset), SEQ_LEN, seed=1)
    stream.batch(0, BATCH)
    began = time.perf_counter()
    for number in range(1, batches + 1):
        stream.batch(number * BATCH, BATCH)
    return batches * BATCH * SEQ_LEN / (time.perf_counter() - began)


def read_peer(args: argparse.Namespace, work: Path, dataset: Path, workers: int) -> float:
    """Tokens per second of litdata's loader."""
    log = work / "logs" / f"litdata-{workers}.txt"
    numbers = [str(n) for n in (SEQ_LEN, BATCH, workers, args.batches)]
    script = str(IN_PROCESS / "litdata_reading.py")
    run_child([args.peer_python, script, str(dataset), *numbers], log)
    printed = [line for line in log.read_text().splitlines() if line.startswith('{"tokens')]
    return float(json.loads(printed[-1])["tokens_per_s"])


def data_wait(work: Path, dataset: Path) -> list[float]:
    """Of each step of a pythia-14m run, the share spent waiting for data."""
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    words = ["pretrain", "pythia-14m", "--data", "LitData", "--data.data_path", str(dataset)]
    words += ["--train.max_seq_length", "512", "--train.global_batch_size", "4"]
    words += ["--train.max_steps", "40", "--out_dir", str(out)]
    run_child(gristmill(*words), work / "logs/pretrain.txt")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "data_wait_s" in row]
    return [row["data_wait_s"] / row["step_time_s"] for row in rows[10:]]


def report(
    args: argparse.Namespace, order: dict[str, float], reading: dict[str, list[float]]
) -> None:
    """The tables and the JSON line."""
    print_table(["order", ""], [[name, f"{value:,.3f}"] for name, value in order.items()])
    if reading:
        rows = []
        for name, values in reading.items():
            median = statistics.median(values)
            rows.append([name, f"{median:,.5f}" if median < 1 else f"{median:,.0f}"])
        print_table(["reading", "tokens/s"], rows)
        peers = [statistics.median(v) for n, v in reading.items() if n.startswith("litdata")]
        if peers:
            print(f"ours / litdata: {statistics.median(reading['ours']) / max(peers):.1f}")
    summary = {name: spread(values) for name, values in reading.items()}
    packages = versions(sys.executable, ["gristmill", "numpy"])
    line = {"benchmark": "stream", **environment(1), **packages, **order, "reading": summary}
    print(json.dumps(line))


if __name__ == "__main__":
    main()

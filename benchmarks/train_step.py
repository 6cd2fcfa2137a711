"""Speed and memory of training, beside LitGPT's own `pretrain` on the same model, batch and tokens.

    python benchmarks/train_step.py --peer_python PEER/bin/python [--rounds 5] [--steps 60]

Both commands run as a user runs them, each in a process of its own, in turns. What is measured is
the time from one iteration to the next, everything in between included (data, logging), from
outside: by a hook of ours, by the data module of LitGPT. A run's figure is its median iteration
after the first 20; the result is the median over rounds of the ratios. Memory is the peak of the
process. Without --peer_python only ours is measured. `benchmarks/README.md` says how to make PEER.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import Child, environment, print_table, run_child, spread, versions

from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset

MODEL = "pythia-14m"
BATCH, SEQ_LEN = 4, 512
WARM = 20
SEED = 42
IN_PROCESS = Path(__file__).resolve().parent / "in_process"


@dataclass(frozen=True)
class Result:
    """One run of one side."""

    tokens_per_s: float
    peak_bytes: int


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parse_arguments()
    work = Path(args.work_dir or tempfile.mkdtemp(prefix="train-step-"))
    dataset = prepare(work, args.text)
    tokens = dump_tokens(dataset, work / f"tokens-{args.steps}.npy", args.steps)
    sides = {"gristmill": lambda n: run_ours(work, dataset, args, n)}
    if args.peer_python:
        sides["litgpt"] = lambda n: run_peer(work, tokens, args, n)
    for run in sides.values() if args.warm_up else ():
        run(-1)  # fills the compilers' caches, so that all rounds are alike
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, run in sides.items():
            result = run(number)
            results[name].append(result)
            print(
                f"round {number + 1} {name}: {result.tokens_per_s:,.0f} tokens/s, "
                f"{result.peak_bytes / 1e6:,.0f} MB",
                file=sys.stderr,
            )
    report(args, results, import_peaks(work, args))
    if not args.work_dir:
        shutil.rmtree(work)


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer_python", help="interpreter of an environment with LitGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="iterations of each run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", help="folder of .txt, or .jsonl file (default: Python's library)")
    parser.add_argument("--work_dir", help="where tokenizer, dataset and runs go, and stay")
    parser.add_argument("--warm_up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ours", nargs="*", default=[], help="more options for gristmill pretrain")
    args = parser.parse_args()
    if args.steps <= WARM + 5:
        parser.error(f"--steps {args.steps}: the first {WARM} do not count, so give more")
    return args


def gristmill(*words: str) -> list[str]:
    """The command line of one of our commands, in this interpreter."""
    return [sys.executable, "-m", "gristmill", *words]


def prepare(work: Path, text: str | None) -> Path:
    """A tokenizer and a dataset of real text; what a --work_dir has already is used."""
    source = Path(text) if text else Path(sysconfig.get_paths()["stdlib"])
    layout = "jsonl" if ".jsonl" in source.name else "textfiles"
    pattern = [] if text else ["--pattern", "*.py"]
    tokenizer, dataset = work / "tokenizer", work / "dataset"
    if not tokenizer.exists():
        words = ["--input_dir", str(source), "--out_dir", str(tokenizer), "--layout", layout]
        words += ["--vocab_size", "50000", "--max_bytes", "10_000_000", *pattern]
        run_child(gristmill("tokenizer", "train", *words), work / "logs/tokenizer.txt")
    if not dataset.exists():
        words = [layout, "--input_dir", str(source), "--output_dir", str(dataset), *pattern]
        words += ["--tokenizer_dir", str(tokenizer), "--val_fraction", "0.01"]
        run_child(gristmill("prepare", *words), work / "logs/prepare.txt")
    return dataset


def dump_tokens(dataset: Path, path: Path, steps: int) -> Path:
    """The batches that our run will read, int64 [steps, BATCH, SEQ_LEN + 1], for the peer."""
    stream = TokenStream(Dataset.open(dataset / "train"), SEQ_LEN, seed=SEED)
    np.save(path, np.stack([stream.batch(i * BATCH, BATCH).tokens for i in range(steps)]))
    return path


def run_ours(work: Path, dataset: Path, args: argparse.Namespace, number: int) -> Result:
    """One `gristmill pretrain` from start to end."""
    words = ["pretrain", MODEL, *common_options(work / f"ours-{number}", args.steps)]
    words += ["--data", "LitData", "--data.data_path", str(dataset), "--data.seed", str(SEED)]
    words += ["--hook", "stamp_steps:stamp", *args.ours]
    return measured(gristmill(*words), work, "ours", args.threads, number)


def run_peer(work: Path, tokens: Path, args: argparse.Namespace, number: int) -> Result:
    """One `litgpt pretrain` from start to end."""
    words = ["pretrain", MODEL, *common_options(work / f"peer-{number}", args.steps)]
    words += ["--data", "litgpt_fixed_tokens.FixedTokens", "--data.tokens_path", str(tokens)]
    words += ["--logger_name", "csv", "--devices", "1"]
    command = [args.peer_python, "-m", "litgpt", *words]
    return measured(command, work, "peer", args.threads, number)


def common_options(out_dir: Path, steps: int) -> list[str]:
    """The options that both commands have; all others are left at their defaults."""
    shutil.rmtree(out_dir, ignore_errors=True)
    return [
        f"--out_dir={out_dir}",
        "--precision=bf16-mixed",
        f"--train.max_tokens={steps * BATCH * SEQ_LEN}",
        f"--train.global_batch_size={BATCH}",
        f"--train.micro_batch_size={BATCH}",
        f"--train.max_seq_length={SEQ_LEN}",
        "--train.lr_warmup_steps=20",
        "--train.save_interval=1000",
        "--eval.interval=1000",
        "--eval.max_iters=100",
    ]


def measured(command: list[str], work: Path, side: str, threads: int, number: int) -> Result:
    """Run a training command and read its stamps; its output directory goes afterwards."""
    stamps = work / "logs" / f"{side}-{number}.stamps"
    stamps.unlink(missing_ok=True)
    env = {
        "STAMPS": str(stamps),
        "PYTHONPATH": os.pathsep.join([str(IN_PROCESS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(work / f"inductor-{side}"),
    }
    child = run_child(command, work / "logs" / f"{side}-{number}.txt", env)
    shutil.rmtree(work / f"{side}-{number}")
    times = [float(line) for line in stamps.read_text().split()]
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    return Result(BATCH * SEQ_LEN / statistics.median(gaps[WARM:]), child.peak_bytes)


def import_peaks(work: Path, args: argparse.Namespace) -> dict[str, Child]:
    """Memory of a process that has only imported each side's training module."""
    imports = {"gristmill": (sys.executable, "import gristmill.train.fit")}
    if args.peer_python:
        imports["litgpt"] = (args.peer_python, "import litgpt.pretrain")
    return {
        name: run_child([python, "-c", code], work / f"logs/import-{name}.txt")
        for name, (python, code) in imports.items()
    }


def report(
    args: argparse.Namespace, results: dict[str, list[Result]], imports: dict[str, Child]
) -> None:
    """The table for people, then one JSON line."""
    record: dict[str, object] = {
        "benchmark": "train_step",
        "model": MODEL,
        "batch": [BATCH, SEQ_LEN],
        "precision": "bf16-mixed",
        "rounds": args.rounds,
        "steps": args.steps,
        **environment(args.threads),
        "versions": versions(sys.executable, ["gristmill", "torch"]),
    }
    rows = []
    for name, runs in results.items():
        speed = spread([run.tokens_per_s for run in runs])
        peak = spread([float(run.peak_bytes) for run in runs])
        above = peak["median"] - imports[name].peak_bytes
        rows.append(
            [
                name,
                f"{speed['median']:,.0f}",
                f"{speed['p10']:,.0f} - {speed['p90']:,.0f}",
                f"{BATCH * SEQ_LEN / speed['median'] * 1e3:,.0f}",
                f"{peak['median'] / 1e6:,.0f}",
                f"{above / 1e6:,.0f}",
            ]
        )
        record[name] = {"tokens_per_s": speed, "peak_bytes": peak, "peak_above_import_bytes": above}
    print_table(["", "tokens/s", "p10 - p90", "step ms", "peak MB", "above import MB"], rows)
    if "litgpt" in results:
        pairs = list(zip(results["gristmill"], results["litgpt"]))
        speed = spread([ours.tokens_per_s / peer.tokens_per_s for ours, peer in pairs])
        memory = spread([ours.peak_bytes / peer.peak_bytes for ours, peer in pairs])
        record["peer_versions"] = versions(args.peer_python, ["litgpt", "torch", "lightning"])
        record["ratio"] = {"tokens_per_s": speed, "peak_bytes": memory}
        print(
            f"\n{speed['median']:.2f} times the tokens per second of LitGPT (median of "
            f"{args.rounds} ratios), {memory['median']:.2f} times its peak memory\n"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()

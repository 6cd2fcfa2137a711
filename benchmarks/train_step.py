"""Speed and memory of training beside other tools, on the same model, batch and tokens.

    python benchmarks/train_step.py --peer_python PEER/bin/python --hf_python HF/bin/python
        [--models pythia-14m:4x512 pythia-160m:2x1024] [--rounds 5] [--steps 60]

Peers: LitGPT's own `pretrain`, Hugging Face's Trainer (compiled) and a loop in the style of nanoGPT
(`in_process/plain_loop.py`), each in a process of its own, in turns. What is measured is the time
from one iteration to the next, everything in between included (data, logging). Between iterations
every side times one bf16 product of 2048 x 2048 matrices, which is not counted: its median is the
peak that MFU is given against. A run's figure is its median iteration after the first third; the
result is the median over rounds of the ratios. Memory is the peak of the process. Without
--peer_python and --hf_python those are left out. `benchmarks/README.md` says how to make them.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import (
    IN_PROCESS,
    Child,
    environment,
    gristmill,
    print_table,
    run_child,
    run_stamped,
    spread,
    versions,
)

from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset
from gristmill.models import counts, zoo

SEED = 42
PROBE_FLOPS = 2 * 2048**3


@dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on."""

    model: str
    batch: int
    seq_len: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """`pythia-14m:4x512`."""
        model, _, shape = text.partition(":")
        batch, _, seq_len = shape.partition("x")
        return cls(model, int(batch), int(seq_len))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq_len


@dataclass(frozen=True)
class Result:
    """One run of one side."""

    tokens_per_s: float
    peak_bytes: int
    mfu: float
    """Operations of the model's products per second over those of the product timed between."""


def main() -> None:
    """Measure, print a table and a JSON line for each model."""
    args = parse_arguments()
    work = Path(args.work_dir or tempfile.mkdtemp(prefix="train-step-"))
    dataset = prepare(work, args.text)
    for case in map(Case.parse, args.models):
        measure(case, work, dataset, args)
    if not args.work_dir:
        shutil.rmtree(work)


def measure(case: Case, work: Path, dataset: Path, args: argparse.Namespace) -> None:
    """All rounds of one model."""
    folder = work / f"{case.model}-{case.batch}x{case.seq_len}"
    folder.mkdir(exist_ok=True)
    tokens = dump_tokens(case, dataset, folder / f"tokens-{args.steps}.npy", args.steps)
    config = folder / "config.json"
    model = zoo.get(case.model)
    config.write_text(json.dumps(zoo.family(model.family).to_hf_config(model)))
    sides: dict[str, Callable[[int], Result]] = {
        "gristmill": lambda n: run_ours(case, folder, dataset, args, n)
    }
    if args.peer_python:
        sides["litgpt"] = lambda n: run_litgpt(case, folder, tokens, args, n)
    if args.hf_python:
        sides["trainer"] = lambda n: run_trainer(case, folder, config, tokens, args, n)
    if args.plain:
        sides["plain loop"] = lambda n: run_plain(case, folder, config, tokens, args, n)
    for run in sides.values() if args.warm_up else ():
        run(-1)  # fills the compilers' caches, so that all rounds are alike
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, run in sides.items():
            result = run(number)
            results[name].append(result)
            print(
                f"{case.model} round {number + 1} {name}: {result.tokens_per_s:,.0f} tokens/s, "
                f"{result.peak_bytes / 1e6:,.0f} MB, MFU {100 * result.mfu:.0f} %",
                file=sys.stderr,
            )
    report(case, args, results, import_peaks(folder, args))


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    both = ["pythia-14m:4x512", "pythia-160m:2x1024"]
    parser.add_argument("--models", nargs="*", default=both, help="MODEL:ROWSxTOKENS of a batch")
    parser.add_argument("--peer_python", help="interpreter of an environment with LitGPT")
    parser.add_argument("--hf_python", help="interpreter with transformers and accelerate")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="iterations of each run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", help="folder of .txt, or .jsonl file (default: Python's library)")
    parser.add_argument("--work_dir", help="where tokenizer, dataset and runs go, and stay")
    parser.add_argument("--warm_up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ours", nargs="*", default=[], help="more options for gristmill pretrain")
    args = parser.parse_args()
    if args.steps < 6:
        parser.error(f"--steps {args.steps}: the first third does not count, so give 6 or more")
    return args


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


def dump_tokens(case: Case, dataset: Path, path: Path, steps: int) -> Path:
    """The batches that our run will read, int64 [steps, batch, seq_len + 1], for the peers."""
    stream = TokenStream(Dataset.open(dataset / "train"), case.seq_len, seed=SEED)
    rows = case.batch
    np.save(path, np.stack([stream.batch(i * rows, rows).tokens for i in range(steps)]))
    return path


def run_ours(
    case: Case, work: Path, dataset: Path, args: argparse.Namespace, number: int
) -> Result:
    """One `gristmill pretrain` from start to end."""
    words = ["pretrain", case.model, *common_options(case, work / f"ours-{number}", args.steps)]
    words += ["--data", "LitData", "--data.data_path", str(dataset), "--data.seed", str(SEED)]
    words += ["--hook", "stamp_steps:stamp", *args.ours]
    return measured(case, gristmill(*words), work, "ours", args.threads, number)


def run_litgpt(
    case: Case, work: Path, tokens: Path, args: argparse.Namespace, number: int
) -> Result:
    """One `litgpt pretrain` from start to end."""
    words = ["pretrain", case.model, *common_options(case, work / f"litgpt-{number}", args.steps)]
    words += ["--data", "litgpt_fixed_tokens.FixedTokens", "--data.tokens_path", str(tokens)]
    words += ["--logger_name", "csv", "--devices", "1"]
    command = [args.peer_python, "-m", "litgpt", *words]
    return measured(case, command, work, "litgpt", args.threads, number)


def run_trainer(
    case: Case, work: Path, config: Path, tokens: Path, args: argparse.Namespace, number: int
) -> Result:
    """Hugging Face's Trainer over all batches."""
    words = [str(config), str(tokens), str(work / f"trainer-{number}")]
    command = [args.hf_python, str(IN_PROCESS / "hf_trainer.py"), *words]
    return measured(case, command, work, "trainer", args.threads, number)


def run_plain(
    case: Case, work: Path, config: Path, tokens: Path, args: argparse.Namespace, number: int
) -> Result:
    """The loop in the style of nanoGPT over all batches."""
    command = [sys.executable, str(IN_PROCESS / "plain_loop.py"), str(config), str(tokens)]
    return measured(case, command, work, "plain", args.threads, number)


def common_options(case: Case, out_dir: Path, steps: int) -> list[str]:
    """The options that both commands have; all others are left at their defaults."""
    shutil.rmtree(out_dir, ignore_errors=True)
    return [
        f"--out_dir={out_dir}",
        "--precision=bf16-mixed",
        f"--train.max_tokens={steps * case.tokens}",
        f"--train.global_batch_size={case.batch}",
        f"--train.micro_batch_size={case.batch}",
        f"--train.max_seq_length={case.seq_len}",
        f"--train.lr_warmup_steps={min(20, steps // 2)}",
        "--train.save_interval=1000",
        "--eval.interval=1000",
        "--eval.max_iters=8",
    ]


def measured(
    case: Case, command: list[str], work: Path, side: str, threads: int, number: int
) -> Result:
    """Run a training command and read its stamps; its output directory goes afterwards."""
    log = work / "logs" / f"{side}-{number}.txt"
    child, stamps = run_stamped(command, log, threads, work / f"inductor-{side}")
    shutil.rmtree(work / f"{side}-{number}", ignore_errors=True)
    gaps = [later[0] - earlier[1] for earlier, later in zip(stamps, stamps[1:])]
    counted = gaps[len(gaps) // 3 :]
    speed = case.tokens / statistics.median(counted)
    peak = PROBE_FLOPS / statistics.median([probe for _, _, probe in stamps[-len(counted) :]])
    flops = counts.flops_per_token(zoo.get(case.model), case.seq_len)
    return Result(speed, child.peak_bytes, speed * flops / peak)


def import_peaks(work: Path, args: argparse.Namespace) -> dict[str, Child]:
    """Memory of a process that has only imported each side's training module."""
    imports = {
        "gristmill": (sys.executable, "import gristmill.train.fit"),
        "litgpt": (args.peer_python, "import litgpt.pretrain"),
        "trainer": (args.hf_python, "from transformers import Trainer, GPTNeoXForCausalLM"),
        "plain loop": (sys.executable, "import torch"),
    }
    return {
        name: run_child([python, "-c", code], work / f"logs/import-{name}.txt")
        for name, (python, code) in imports.items()
        if python
    }


def report(
    case: Case,
    args: argparse.Namespace,
    results: dict[str, list[Result]],
    imports: dict[str, Child],
) -> None:
    """The table for people, then one JSON line."""
    record: dict[str, object] = {
        "benchmark": "train_step",
        "model": case.model,
        "batch": [case.batch, case.seq_len],
        "precision": "bf16-mixed",
        "rounds": args.rounds,
        "steps": args.steps,
        "load_average": os.getloadavg(),
        **environment(args.threads),
        "versions": versions(sys.executable, ["gristmill", "torch"]),
    }
    if args.peer_python:
        record["litgpt_versions"] = versions(args.peer_python, ["litgpt", "torch", "lightning"])
    if args.hf_python:
        record["trainer_versions"] = versions(args.hf_python, ["transformers", "accelerate"])
    rows = []
    for name, runs in results.items():
        speed = spread([run.tokens_per_s for run in runs])
        peak = spread([float(run.peak_bytes) for run in runs])
        mfu = spread([run.mfu for run in runs])
        pairs = list(zip(results["gristmill"], runs))
        faster = spread([ours.tokens_per_s / peer.tokens_per_s for ours, peer in pairs])
        memory = spread([ours.peak_bytes / peer.peak_bytes for ours, peer in pairs])
        above = f"{(peak['median'] - imports[name].peak_bytes) / 1e6:,.0f}"
        rows.append(
            [
                name,
                f"{speed['median']:,.0f}",
                f"{speed['p10']:,.0f} - {speed['p90']:,.0f}",
                f"{case.tokens / speed['median'] * 1e3:,.0f}",
                f"{100 * mfu['median']:.0f}",
                f"{peak['median'] / 1e6:,.0f}",
                above,
                f"{faster['median']:.2f}",
                f"{memory['median']:.2f}",
            ]
        )
        record[name] = {"tokens_per_s": speed, "peak_bytes": peak, "mfu": mfu}
        record[f"gristmill / {name}"] = {"tokens_per_s": faster, "peak_bytes": memory}
    print(f"\n{case.model}, batches of {case.batch} x {case.seq_len} tokens")
    header = ["", "tokens/s", "p10 - p90", "step ms", "MFU %", "peak MB", "above import"]
    print_table([*header, "ours is faster", "our memory"], rows)
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

"""Speed and memory of LoRA finetuning beside LitGPT's `finetune_lora`.

    python benchmarks/finetune.py --peer_python PEER/bin/python
        [--model pythia-70m] [--records FILE.json] [--rounds 5] [--steps 30]

The same model (random weights), the same records in the same template, the same batches of 16
records a step, each command in a process of its own, in turns. LitGPT is measured with 1 record at
a time, its default, and with 4, as in its recipes, which pads them to the longest. A figure is the
tokens of records per second, padding not counted, from a third of the run to its end; the result
is the median over rounds of the ratios. Memory is the peak of the process, the finished model
included; `command` is the whole command from start to end.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from _common import (
    environment,
    gristmill,
    print_table,
    run_child,
    run_stamped,
    spread,
    versions,
)

from gristmill.formats import hf
from gristmill.models import zoo
from gristmill.models.counts import parameter_shapes
from gristmill.models.init import initial_value

BATCH = 16
LONGEST_TEXT = 1200
"""Characters of a generated record's parts at most."""


@dataclass(frozen=True)
class Result:
    """One run of one side."""

    tokens_per_s: float
    command_s: float
    peak_bytes: int


def main() -> None:
    """Measure, print a table and a JSON line."""
    args = parse_arguments()
    work = Path(args.work_dir or tempfile.mkdtemp(prefix="finetune-"))
    records = Path(args.records) if args.records else write_records(work / "records.json")
    write_models(work, args.model)
    sides: dict[str, Callable[[int], Result]] = {
        "gristmill": lambda n: run_ours(work, records, args, n)
    }
    for rows in args.peer_rows if args.peer_python else ():
        sides[f"litgpt, {rows} at a time"] = lambda n, rows=rows: run_litgpt(
            work, records, args, n, rows
        )
    if args.warm_up:
        sides["gristmill"](-1)  # fills the compiler's cache; LitGPT does not compile here
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, run in sides.items():
            result = run(number)
            results[name].append(result)
            print(
                f"round {number + 1} {name}: {result.tokens_per_s:,.0f} tokens/s, "
                f"{result.command_s:,.0f} s, {result.peak_bytes / 1e6:,.0f} MB",
                file=sys.stderr,
            )
    report(args, results)
    if not args.work_dir:
        shutil.rmtree(work)


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer_python", help="interpreter of an environment with LitGPT")
    parser.add_argument("--peer_rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--model", default="pythia-70m")
    parser.add_argument("--records", help="JSON list of instructions (default: docstrings)")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="steps of 16 records in each run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work_dir", help="where models and runs go, and stay")
    parser.add_argument("--warm_up", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ours", nargs="*", default=[], help="more options for gristmill")
    args = parser.parse_args()
    if args.steps < 6:
        parser.error(f"--steps {args.steps}: the first third does not count, so give 6 or more")
    return args


def write_records(file: Path) -> Path:
    """Functions of Python's library and what their docstrings say of them, as instructions."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        file.write_text(json.dumps([r for source in sources for r in documented(source)]))
    return file


def documented(source: Path) -> Iterator[dict[str, str]]:
    """Records of one file of Python."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
            node.body.pop(0)  # the docstring
            yield {
                "instruction": f"Document the function {node.name}.",
                "input": ast.unparse(node)[:LONGEST_TEXT],
                "output": said[:LONGEST_TEXT],
            }


def write_models(work: Path, name: str) -> None:
    """The model with random weights for both sides, and a tokenizer of Python's library."""
    if (work / "litgpt").exists():
        return
    words = ["--input_dir", sysconfig.get_paths()["stdlib"], "--out_dir", str(work / "tokenizer")]
    words += ["--layout", "textfiles", "--pattern", "*.py", "--vocab_size", "50000"]
    words += ["--max_bytes", "10_000_000"]
    run_child(gristmill("tokenizer", "train", *words), work / "tokens.txt")
    config = zoo.get(name)
    weights = {
        name: initial_value(config, name, shape, 0)
        for name, shape in parameter_shapes(config).items()
    }
    hf.write(work / "hf", config, weights, tokenizer_dir=work / "tokenizer")
    place = [str(work / "hf"), str(work / "litgpt"), "--format", "litgpt"]
    run_child(gristmill("export", *place), work / "export.txt")


def run_ours(work: Path, records: Path, args: argparse.Namespace, number: int) -> Result:
    """One `gristmill finetune lora` from start to end."""
    out = work / f"ours-{number}"
    words = ["finetune_lora", str(work / "hf"), "--data", "JSON"]
    words += [*common_options(records, out, args), "--train.max_norm", "null"]
    words += ["--hook", "stamp_tokens:stamp", *args.ours]
    return measured(gristmill(*words), work, out, args.threads)


def run_litgpt(
    work: Path, records: Path, args: argparse.Namespace, number: int, rows: int
) -> Result:
    """One `litgpt finetune_lora` from start to end."""
    out = work / f"litgpt-{rows}-{number}"
    words = ["finetune_lora", str(work / "litgpt"), "--data", "litgpt_records.StampedJSON"]
    words += [*common_options(records, out, args), "--devices", "1"]
    words += ["--train.micro_batch_size", str(rows)]
    return measured([args.peer_python, "-m", "litgpt", *words], work, out, args.threads)


def common_options(records: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The options that both commands have; all others are left at their defaults."""
    shutil.rmtree(out, ignore_errors=True)
    return [
        f"--out_dir={out}",
        f"--precision={args.precision}",
        f"--data.json_path={records}",
        "--data.val_split_fraction=0.01",
        "--data.mask_prompt=true",
        "--data.prompt_style=alpaca",
        "--train.max_seq_length=512",
        f"--train.max_steps={args.steps}",
        f"--train.global_batch_size={BATCH}",
        "--train.lr_warmup_steps=5",
        "--train.save_interval=100000",
        "--eval.interval=100000",
        "--eval.max_iters=8",
    ]


def measured(command: list[str], work: Path, out: Path, threads: int) -> Result:
    """Run a command and read its stamps; its output directory goes afterwards."""
    log = work / "logs" / f"{out.name}.txt"
    child, stamps = run_stamped(command, log, threads, work / "inductor")
    shutil.rmtree(out, ignore_errors=True)
    last_s, total = stamps[-1]
    first_s, before = next(stamp for stamp in stamps if stamp[1] >= total / 3)
    return Result((total - before) / (last_s - first_s), child.seconds, child.peak_bytes)


def report(args: argparse.Namespace, results: dict[str, list[Result]]) -> None:
    """The table for people, then one JSON line."""
    record: dict[str, object] = {
        "benchmark": "finetune",
        "model": args.model,
        "precision": args.precision,
        "rounds": args.rounds,
        "steps": args.steps,
        "load_average": os.getloadavg(),
        **environment(args.threads),
        "versions": versions(sys.executable, ["gristmill", "torch", "peft"]),
    }
    if args.peer_python:
        record["litgpt_versions"] = versions(args.peer_python, ["litgpt", "torch", "lightning"])
    rows = []
    for name, runs in results.items():
        speed = spread([run.tokens_per_s for run in runs])
        peak = spread([float(run.peak_bytes) for run in runs])
        command = spread([run.command_s for run in runs])
        pairs = list(zip(results["gristmill"], runs, strict=True))
        faster = spread([ours.tokens_per_s / peer.tokens_per_s for ours, peer in pairs])
        memory = spread([ours.peak_bytes / peer.peak_bytes for ours, peer in pairs])
        rows.append(
            [
                name,
                f"{speed['median']:,.0f}",
                f"{speed['p10']:,.0f} - {speed['p90']:,.0f}",
                f"{command['median']:,.0f}",
                f"{peak['median'] / 1e6:,.0f}",
                f"{faster['median']:.2f}",
                f"{memory['median']:.2f}",
            ]
        )
        record[name] = {"tokens_per_s": speed, "peak_bytes": peak, "command_s": command}
        record[f"gristmill / {name}"] = {"tokens_per_s": faster, "peak_bytes": memory}
    print(f"\nLoRA on {args.model}, {args.precision}, {BATCH} records a step")
    header = ["", "tokens/s", "p10 - p90", "command s", "peak MB", "ours is faster", "our memory"]
    print_table(header, rows)
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

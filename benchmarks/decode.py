"""Tokens per second of decoding, beside LitGPT and `generate` of transformers.

    python benchmarks/decode.py --litgpt PEER/bin/python [--hf_python HF/bin/python] [--rounds 5]

A model of the shapes of SmolLM2-135M with random weights, in bf16, greedy, one prompt and eight of
one length (what LitGPT's batches can hold). Each tool is a process that keeps its model loaded;
they take turns, and figures are medians over rounds. "limit" is the tokens per second at which
reading each weight once per token would take all of the memory bandwidth that our process, with
the same threads, measures in the same rounds by summing a buffer as large as the weights. A step
reads the keys and values of each row as well: "with cache" counts them, at their mean length.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _common import environment, print_table, versions

from gristmill.formats import hf
from gristmill.models import zoo
from gristmill.models.cache import kv_cache_bytes
from gristmill.models.counts import parameter_shapes

HERE = Path(__file__).resolve().parent / "in_process"
MODEL = "SmolLM2-135M"


@dataclass
class Side:
    """A tool as it is used, and what it took."""

    name: str
    worker: subprocess.Popen[str]
    compile: bool
    first: dict[int, list[float]] = field(default_factory=dict)
    rate: dict[int, list[float]] = field(default_factory=dict)
    """Tokens per second behind the first token, of all rows together."""
    ids: dict[int, list[list[int]]] = field(default_factory=dict)

    def ask(self, job: dict[str, object]) -> dict[str, object]:
        """Send a line and wait for the answer."""
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.write(json.dumps(job) + "\n")
        self.worker.stdin.flush()
        line = self.worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; its output is above")
        answer: dict[str, object] = json.loads(line)
        return answer


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as temporary:
        directory = Path(temporary)
        num_bytes = write_model(directory)
        sides = start(args, directory)
        reads = measure(sides, args, num_bytes)
        for side in sides:
            if side.worker.stdin is not None:
                side.worker.stdin.close()
            side.worker.wait()
    limit = 1 / statistics.median(reads)
    report(sides, args, limit, num_bytes)


def parse_arguments() -> argparse.Namespace:
    """The options; `--help` prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--litgpt", help="interpreter of an environment with LitGPT")
    parser.add_argument("--hf_python", default=sys.executable, help="one with transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="measure all compiled too")
    parser.add_argument("--int8", action="store_true", help="measure int8 weights too")
    parser.add_argument("--work_dir", help="where the model is written; unset: a temporary folder")
    return parser.parse_args()


def write_model(directory: Path) -> int:
    """The model as a Hugging Face and a LitGPT directory; the bytes of its weights."""
    config = zoo.get(MODEL)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        values = torch.randn(shape, generator=generator).mul_(0.05 if len(shape) > 1 else 0.1)
        weights[name] = (values if len(shape) > 1 else 1 + values).bfloat16()
    hf.write(directory / "hf", config, weights, tokenizer_dir=None, dtype=torch.bfloat16)
    export = ["gristmill", "export", str(directory / "hf"), str(directory / "litgpt")]
    subprocess.run([sys.executable, "-m", *export, "--format", "litgpt"], check=True)
    return sum(tensor.nbytes for tensor in weights.values())


def start(args: argparse.Namespace, directory: Path) -> list[Side]:
    """All tools, their models loaded."""
    threads = str(args.threads)

    def worker(python: str, script: str, folder: str, *more: str) -> subprocess.Popen[str]:
        command = [python, str(HERE / script), str(directory / folder), threads, *more]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line.strip() != "ready":
            pass
        return process

    ours = worker(sys.executable, "decode_gristmill.py", "hf")
    sides = [Side("gristmill", ours, False)]
    if args.compiled:
        sides.append(Side("gristmill, compiled", ours, True))
    if args.int8:
        int8 = worker(sys.executable, "decode_gristmill.py", "hf", "int8")
        sides.append(Side("gristmill, int8", int8, False))
    peers = [Side("transformers", worker(args.hf_python, "decode_transformers.py", "hf"), False)]
    if args.litgpt:
        peers.append(Side("LitGPT", worker(args.litgpt, "decode_litgpt.py", "litgpt"), False))
    if args.compiled:
        peers += [Side(f"{peer.name}, compiled", peer.worker, True) for peer in peers]
    return sides + peers


def measure(sides: list[Side], args: argparse.Namespace, num_bytes: int) -> list[float]:
    """Fill the sides' figures in turns; seconds of reading the weights' bytes in each round."""
    reads = []
    pick = random.Random(1)
    prompts = [[pick.randrange(10, 40000) for _ in range(args.prompt_tokens)] for _ in range(64)]
    for number in range(args.rounds + 1):
        for rows in args.batches:
            reads.append(float(str(sides[0].ask({"read": num_bytes})["seconds"])))
            for side in sides:
                if side.compile and rows > 1 and side.name == "LitGPT, compiled":
                    continue  # its batched function is not the one that is compiled
                job = {"new": args.new_tokens, "compile": side.compile}
                answer = side.ask({"prompts": prompts[:rows], **job})
                if number == 0:  # warms and compiles
                    continue
                first, total = float(str(answer["first_s"])), float(str(answer["total_s"]))
                rate = rows * (args.new_tokens - 1) / (total - first)
                side.first.setdefault(rows, []).append(first)
                side.rate.setdefault(rows, []).append(rate)
                side.ids[rows] = answer["ids"]  # type: ignore[assignment]
    return reads[len(args.batches) :]


def report(sides: list[Side], args: argparse.Namespace, limit: float, num_bytes: int) -> None:
    """Print the table and the JSON line."""
    rows, found = [], []
    ours, config = sides[0], zoo.get(MODEL)
    for batch in args.batches:
        for side in sides:
            if batch not in side.rate:
                continue
            rate = statistics.median(side.rate[batch])
            ratio = statistics.median(a / b for a, b in zip(ours.rate[batch], side.rate[batch]))
            first = statistics.median(side.first[batch])
            share = rate / batch / limit
            cached = kv_cache_bytes(config, batch, args.prompt_tokens + args.new_tokens // 2)
            all_share = share * (1 + cached / num_bytes)
            same = agreement(ours.ids[batch], side.ids[batch])
            cells = (
                f"{rate:.1f}",
                f"{ratio:.2f}",
                f"{share:.0%}",
                f"{all_share:.0%}",
                f"{1e3 * first:.0f}",
            )
            rows.append((f"batch {batch}: {side.name}", *cells, f"{same:.0%}"))
            found.append(
                {
                    "batch": batch,
                    "side": side.name,
                    "tokens_per_s": rate,
                    "gristmill_is_times_as_fast": ratio,
                    "share_of_limit": share,
                    "share_with_cache": all_share,
                    "first_token_ms": 1e3 * first,
                    "first_ids_equal": same,
                }
            )
    print(f"{num_bytes * limit / 1e9:.1f} GB/s: limit {limit:.1f} tokens/s for each row")
    header = ("side", "tokens/s", "ours is x", "of limit", "with cache", "first ms", "same ids")
    print_table(header, rows)
    result = {
        "benchmark": "decode",
        "model": MODEL,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "bandwidth_bytes_per_s": num_bytes * limit,
        "results": found,
        "environment": environment(args.threads),
        "versions": versions(args.hf_python, ["torch", "transformers"])
        | (versions(args.litgpt, ["litgpt"]) if args.litgpt else {}),
    }
    print(json.dumps(result))


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of ids before the first difference of each row: bf16 sums differ in order."""
    equal = total = 0
    for a, b in zip(ours, theirs):
        total += len(a)
        for left, right in zip(a, b):
            if left != right:
                break
            equal += 1
    return equal / max(total, 1)


if __name__ == "__main__":
    main()

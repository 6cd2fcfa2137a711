"""Answers per second of `gristmill evaluate` beside lm-evaluation-harness's Hugging Face model.

    python benchmarks/evaluate.py --evals EVALS --tokenizer_dir NEOX
        [--precision bf16-true 32-true] [--model DIRECTORY] [--peer_python PEER/bin/python]
        [--limit N] [--questions N] [--rounds 3]

EVALS is a folder of BLiMP files (`sentence_good`, `sentence_bad`). Without `--model` a random
Llama-shaped model of 135 M parameters is measured. Two processes, ours and the peer, each with the
model in memory, answer the same requests in turns; the peer at the batch size that was its best on
a part of them. Two sets: the pairs themselves, and questions of eight sentences with four answers
each. Loading, tokenizers' first use and imports are not counted.

Both answer every item, and the items that they decide otherwise are counted. Two precisions compute
with the same weights, so that each side's rounding is also seen by itself: the items that it
decides otherwise than it does in float32, and how far apart the two sentences are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from _common import environment, print_table, versions

SHAPE = {
    "vocab_size": 50304,
    "num_layers": 30,
    "hidden_size": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "intermediate_size": 1536,
    "max_seq_length": 2048,
    "tie_embeddings": True,
}
DTYPES = {"32-true": "float32", "bf16-true": "bfloat16"}
PEER_SIZES = (8, 16, 32, 64, 128)
PROBE = 100
"""Requests of a set on which the peer's batch sizes are compared."""


def requests(args: argparse.Namespace) -> dict[str, list[tuple[str, str]]]:
    """(context, continuation) of both sets."""
    rows = []
    for file in sorted(args.evals.glob("*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines[: args.limit]]
    pairs = [("", " " + row[key]) for row in rows for key in ("sentence_good", "sentence_bad")]
    choices = []
    sentences = [row["sentence_good"] for row in rows]
    for start in range(0, len(sentences) - 12, 12):
        context = " ".join(sentences[start : start + 8])
        choices += [(context, " " + answer) for answer in sentences[start + 8 : start + 12]]
    sets = {"pairs": pairs, "choices": choices[: 4 * args.questions]}
    return {name: found for name, found in sets.items() if found}


def part(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """About PROBE of them, from everywhere."""
    return pairs[:: max(1, len(pairs) // PROBE)]


def write_model(out: Path, tokenizer_dir: str) -> None:
    """A random model as a Hugging Face directory, in bf16, which both precisions hold exactly."""
    import torch

    from gristmill.config.model import ModelConfig
    from gristmill.formats import hf
    from gristmill.models.decoder import Decoder
    from gristmill.models.init import init_weights

    model = Decoder(ModelConfig(**SHAPE))
    init_weights(model, seed=1)
    weights = dict(model.state_dict())
    hf.write(out, model.config, weights, tokenizer_dir=tokenizer_dir, dtype=torch.bfloat16)


def work(args: argparse.Namespace) -> None:
    """A measured process: a line `SET SIZE` on stdin is one round, its seconds the answer."""
    from lm_eval.api.instance import Instance

    sets = requests(args)
    sets |= {f"{name}:part": part(pairs) for name, pairs in sets.items()}
    if args.role == "ours":
        from gristmill.measure.subject import Subject

        subjects: dict[str, Any] = {}

        def answer(pairs: list[tuple[str, str]], size: str) -> list[Any]:
            if size not in subjects:
                batch_size = size if size == "auto" else int(size)
                subjects[size] = Subject(
                    args.model,
                    device="cpu",
                    precision=args.precision[0],
                    batch_size=batch_size,
                    seed=1,
                )
            return [tuple(found) for found in subjects[size].answers(pairs)]

    else:
        from lm_eval.models.huggingface import HFLM

        peer = HFLM(str(args.model), device="cpu", dtype=DTYPES[args.precision[0]])

        def answer(pairs: list[tuple[str, str]], size: str) -> list[Any]:
            peer.batch_size_per_gpu = int(size)
            instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
            return list(peer.loglikelihood(instances, disable_tqdm=True))

    for size in args.sizes.split(","):
        answer(sets["pairs"][:8], size)
    print("ready", flush=True)
    for line in sys.stdin:
        name, size = line.split()
        started = time.perf_counter()
        found = answer(sets[name], size)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "answers": found}), flush=True)


class Worker:
    """A process that answers, one round at a time."""

    def __init__(
        self, python: str, role: str, sizes: str, precision: str, args: argparse.Namespace
    ) -> None:
        command = [python, __file__, "--role", role, "--sizes", sizes, "--evals", str(args.evals)]
        command += ["--model", str(args.model), "--precision", precision]
        command += ["--limit", str(args.limit), "--questions", str(args.questions)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(args.work_dir / f"{role}-{precision}.log").open("w"),
            text=True,
        )
        while (line := self._stdout.readline()) and line != "ready\n":
            pass

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def round(self, name: str, size: str) -> tuple[float, list[Any]]:
        """Seconds of one round, and its answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name} {size}\n")
        self.process.stdin.flush()
        line = self._stdout.readline()
        while line and not line.startswith('{"seconds"'):
            line = self._stdout.readline()
        if not line:
            raise RuntimeError("a measured process ended; its log is in --work_dir")
        result = json.loads(line)
        return result["seconds"], result["answers"]


def margins(answers: list[Any]) -> list[float]:
    """By how much the right sentence of each pair is the likelier one; it is chosen above 0."""
    return [good[0] - bad[0] for good, bad in zip(answers[::2], answers[1::2])]


def otherwise(ones: list[float], others: list[float]) -> list[int]:
    """The items that are decided otherwise."""
    return [i for i, (a, b) in enumerate(zip(ones, others)) if (a > 0) != (b > 0)]


def measure(precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds in turns; seconds by set and who, and how the answers compare."""
    ours = Worker(sys.executable, "ours", "auto", precision, args)
    sizes = [str(size) for size in PEER_SIZES]
    peer = Worker(args.peer_python, "peer", ",".join(sizes), precision, args)
    out: dict[str, Any] = {}
    for name, pairs in requests(args).items():
        first = {size: peer.round(f"{name}:part", size)[0] for size in sizes}
        best = min(first, key=lambda size: first[size])
        ours.round(f"{name}:part", "auto")
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(args.rounds):
            taken, found = ours.round(name, "auto")
            seconds["ours"].append(taken)
            taken, theirs = peer.round(name, best)
            seconds["peer"].append(taken)
            print(f"{precision} {name}: {seconds}", file=sys.stderr, flush=True)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["peer"])]
        out[name] = {
            "answers": len(pairs),
            "seconds": seconds,
            "peer_batch_size": int(best),
            "peer_first_seconds": first,
            "ratio": statistics.median(ratios),
            "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(found, theirs)),
        }
        if name == "pairs":
            mine, other = margins(found), margins(theirs)
            apart = otherwise(mine, other)
            out[name]["accuracy"] = [sum(m > 0 for m in each) / len(each) for each in (mine, other)]
            out[name]["items"] = len(mine)
            out[name]["items_that_differ"] = len(apart)
            out[name]["margins"] = {"ours": mine, "peer": other}
    for worker in (ours, peer):
        worker.process.kill()
    return out


def rounding(results: dict[str, Any]) -> dict[str, Any]:
    """What each side's rounding changes against its own float32, and how near a tie that was."""
    exact = results.get("32-true", {}).get("pairs")
    rounded = results.get("bf16-true", {}).get("pairs")
    if not exact or not rounded:
        return {}
    out = {}
    for who in ("ours", "peer"):
        truth = exact["margins"][who]
        changed = otherwise(truth, rounded["margins"][who])
        out[who] = {
            "items_that_differ": len(changed),
            "largest_margin": max((abs(truth[i]) for i in changed), default=0.0),
        }
    return out


def lines_of(precision: str, results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table for people."""
    rows = []
    for name, result in results.items():
        for who in ("ours", "peer"):
            seconds = statistics.median(result["seconds"][who])
            label = "gristmill" if who == "ours" else f"peer, batch {result['peer_batch_size']}"
            rate = result["answers"] / seconds
            rows.append((f"{precision} {name}: {label}", f"{seconds:.2f}", f"{rate:.0f}"))
        rows.append((f"{precision} {name}: ratio", f"{result['ratio']:.2f}", ""))
        if "items" in result:
            apart = f"{result['items_that_differ']} of {result['items']}"
            rows.append((f"{precision} {name}: items decided otherwise", apart, ""))
    return rows


def main() -> None:
    """Measure and print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evals", type=Path, required=True)
    parser.add_argument("--tokenizer_dir", default=None)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument(
        "--precision", choices=sorted(DTYPES), nargs="+", default=["bf16-true", "32-true"]
    )
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--limit", type=int, default=1000, help="pairs of each file")
    parser.add_argument("--questions", type=int, default=60, help="questions with four answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work_dir", type=Path, default=None)
    parser.add_argument("--role", choices=("ours", "peer"), help="a measured process")
    parser.add_argument("--sizes", default="", help="batch sizes of a measured process")
    args = parser.parse_args()
    if args.role is not None:
        work(args)
        return
    args.work_dir = args.work_dir or Path(tempfile.mkdtemp(prefix="evaluate-bench-"))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        args.model = args.work_dir / "model"
        if not args.model.exists():
            write_model(args.model, args.tokenizer_dir)
    results = {precision: measure(precision, args) for precision in args.precision}
    rows = [row for precision, found in results.items() for row in lines_of(precision, found)]
    changes = rounding(results)
    for who, change in changes.items():
        label = "gristmill" if who == "ours" else "peer"
        rows.append((f"bf16 against 32: {label}", str(change["items_that_differ"]), ""))
    print_table(("", "s", "answers/s"), rows)
    for found in results.values():
        found.get("pairs", {}).pop("margins", None)
    line = {
        "benchmark": "evaluate",
        "model": args.model.name,
        "results": results,
        "bf16_against_32": changes,
        "peer": versions(args.peer_python, ["torch", "transformers", "lm_eval"]),
        **environment(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()

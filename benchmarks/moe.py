"""Speed of a layer of experts, beside the two ways that transformers computes it.

    python benchmarks/moe.py [--rounds 7] [--precision bf16-true]

Forward and backward of one layer on fresh random tokens each time (so that experts get another
number of rows each time, as in training), and one token without gradients (as in generation). The
sides are measured in turns in one process; the result is the median over rounds of the ratios.
"experts in a loop" and "grouped_mm" are `experts_implementation` eager and grouped_mm of
transformers' Qwen3-MoE block, not compiled; ours is measured not compiled and compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import environment, print_table, versions
from torch import Tensor, nn

from gristmill.config.model import MixtureOfExperts as Settings
from gristmill.config.model import ModelConfig
from gristmill.models.device import weight_dtype
from gristmill.models.moe import MixtureOfExperts

WARM = 2


@dataclass(frozen=True)
class Case:
    """A layer and what goes through it."""

    name: str
    hidden: int
    inner: int
    experts: int
    per_token: int
    tokens: int


CASES = (
    Case("8 experts, 2 a token, 1,024 tokens", 512, 1024, 8, 2, 1024),
    Case("64 experts, 8 a token, 1,024 tokens", 512, 256, 64, 8, 1024),
    Case("128 experts, 8 a token, 1 token", 1024, 384, 128, 8, 1),
)


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parse_arguments()
    rows, found = [], []
    for case in CASES:
        times = measure(case, args.precision, args.rounds)
        first = times["gristmill"]
        for side, seconds in times.items():
            ratio = statistics.median(s / ours for s, ours in zip(seconds, first))
            milliseconds = 1e3 * statistics.median(seconds)
            rows.append((f"{case.name}: {side}", f"{milliseconds:.2f}", f"{ratio:.2f}"))
            found.append({"case": case.name, "side": side, "ms": milliseconds, "ratio": ratio})
    print_table(("layer", "ms", "times gristmill"), rows)
    result = {
        "benchmark": "moe",
        "precision": args.precision,
        "rounds": args.rounds,
        "results": found,
        "environment": environment(torch.get_num_threads()),
        "versions": versions(sys.executable, ["torch", "transformers"]),
    }
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    """The options; `--help` prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--precision", choices=("bf16-mixed", "bf16-true", "32-true"), default="bf16-mixed"
    )
    return parser.parse_args()


def measure(case: Case, precision: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by side, interleaved."""
    torch.manual_seed(0)
    ours = our_layer(case)
    sides: dict[str, Callable[[Tensor], Tensor]] = {"gristmill": lambda x: ours(x)[0]}
    if case.tokens > 1:
        compiled = torch.compile(ours)
        sides["gristmill, compiled"] = lambda x: compiled(x)[0]
    for name, way in (("experts in a loop", "eager"), ("grouped_mm", "grouped_mm")):
        sides[f"transformers, {name}"] = their_layer(case, way).to(weight_dtype(precision))
    ours.to(weight_dtype(precision))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM + rounds):
        for name, layer in sides.items():
            x = torch.randn(1, case.tokens, case.hidden, dtype=weight_dtype(precision))
            seconds = timed(layer, x, precision == "bf16-mixed", train=case.tokens > 1)
            if number >= WARM:
                times[name].append(seconds)
    return times


def timed(layer: Callable[[Tensor], Tensor], x: Tensor, mixed: bool, *, train: bool) -> float:
    """Seconds of one pass, backward included when training."""
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    x.requires_grad_(train)
    upper = torch.randn_like(x)
    started = time.perf_counter()
    with torch.set_grad_enabled(train):
        with autocast:
            y = layer(x)
        if train:
            y.backward(upper.to(y.dtype))
    return time.perf_counter() - started


def our_layer(case: Case) -> MixtureOfExperts:
    """The layer of gristmill."""
    experts = Settings(
        num_experts=case.experts,
        num_experts_per_token=case.per_token,
        intermediate_size=case.inner,
    )
    return small(MixtureOfExperts(ModelConfig(hidden_size=case.hidden, moe=experts)))


def their_layer(case: Case, way: str) -> nn.Module:
    """The layer of transformers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=case.hidden,
        moe_intermediate_size=case.inner,
        num_experts=case.experts,
        num_experts_per_tok=case.per_token,
        norm_topk_prob=True,
    )
    config._experts_implementation = way
    return small(Qwen3MoeSparseMoeBlock(config))


def small(layer: nn.Module) -> nn.Module:
    """The layer with small random weights."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


if __name__ == "__main__":
    main()

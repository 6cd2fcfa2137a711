"""Whether planning and finalizing stay small at 10^13 tokens: simulated lists, no text.

    python benchmarks/scale.py                  # plan, finalize and open; each in its own process
    python benchmarks/scale.py --tokens 1e12    # a smaller corpus

Each step runs in a process of its own, which gives its time and its largest resident memory. The
limits are those of the goals: a minute and 1 GB for planning and for finalizing, one second and
200 MB for opening (beyond what an idle process with the same modules takes).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _common import run_child

CHUNK_TOKENS = 2**24
TOKENS_PER_BYTE = 1 / 4.2
UNIT_BYTES = 256 << 20
STEPS = ("plan", "finalize", "open")
LIMITS = {"plan": (60, 1000), "finalize": (60, 1000), "open": (1, 200)}
"""Seconds and MB."""


def main() -> int:
    """Run all steps, or one of them as a child process; 1 when a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e13)
    parser.add_argument("--folder", help="where the finished dataset's table goes; unset: scratch")
    parser.add_argument("--step", choices=[*STEPS, "nothing"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        if options.step:
            print(json.dumps(measured(options.step, int(options.tokens), folder)))
            return 0
        return all_steps(options.tokens, folder)


def all_steps(tokens: float, folder: Path) -> int:
    """Run every step in a process of its own; 1 when one is beyond its limits."""
    print(f"{tokens:.0e} tokens: {num_units(int(tokens)):,} files of 256 MB of text")
    late = 0
    idle = run_step("nothing", tokens, folder)["peak_mb"]
    for step in STEPS:
        found = run_step(step, tokens, folder)
        own = found.pop("peak_mb") - (idle if step == "open" else 0)
        seconds, megabytes = LIMITS[step]
        sound = found["seconds"] <= seconds and own <= megabytes
        late += not sound
        rest = ", ".join(f"{name} {value:,}" for name, value in found.items() if name != "seconds")
        print(
            f"{step:9}{found['seconds']:7.2f} s of {seconds}, {own:6.0f} MB of {megabytes:,}"
            f"  {'' if sound else 'TOO MUCH '}({rest})"
        )
    return int(late > 0)


def run_step(step: str, tokens: float, folder: Path) -> dict[str, Any]:
    """What a step in its own process printed."""
    log = folder / f"{step}.log"
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    child = run_child([*command, "--tokens", str(tokens)], log)
    found: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return found | {"peak_mb": child.peak_bytes / 1e6}


def measured(step: str, tokens: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step and what it came to."""
    # What every step imports is no part of what it takes.
    import gristmill.data.preparation.finalize
    import gristmill.data.reading.stream  # noqa: F401

    steps: dict[str, Callable[[int, Path], dict[str, Any]]] = {
        "plan": plan_step,
        "finalize": finalize_step,
        "open": open_step,
        "nothing": lambda *_: {},
    }
    started = time.perf_counter()
    found = steps[step](tokens, folder)
    return {"seconds": round(time.perf_counter() - started, 3), **found}


def num_units(tokens: int) -> int:
    """Units of 256 MB that so many tokens come from."""
    return max(1, round(tokens / TOKENS_PER_BYTE / UNIT_BYTES))


def simulated_plan(tokens: int) -> Any:
    """The plan of files of one unit each, made by the planner's own cutting."""
    from gristmill.data.preparation.plan import Recipe, lay_out
    from gristmill.data.preparation.split import Split
    from gristmill.data.raw.documents import Input

    recipe = Recipe(
        layout="fineweb",
        records="records",
        tokenizer="0" * 64,
        num_token_ids=50_277,
        bos_id=0,
        eos_id=None,
        dtype="uint16",
        chunk_tokens=CHUNK_TOKENS,
        val_fraction=0.0005,
        seed=42,
    )
    inputs = tuple(
        Input(path, path, UNIT_BYTES, f"{n:032x}")
        for n in range(num_units(tokens))
        for path in [f"data/CC-MAIN-2013-{n % 96:02}/{n // 96:03}_{n:05}.jsonl"]
    )
    return lay_out(recipe, inputs, Split(42, 2**32, 0))


def plan_step(tokens: int, folder: Path) -> dict[str, Any]:
    """Plan, name, store and load again."""
    from gristmill.data.preparation.plan import Plan

    plan = simulated_plan(tokens)
    text = json.dumps(plan.to_json(), separators=(",", ":"))
    (folder / "plan.json").write_text(text)
    names = plan.hash, plan.job
    del plan
    again = Plan.from_json(json.loads(text))
    assert (again.hash, again.job) == names
    return {"units": len(again.units), "plan_json_bytes": len(text)}


def finalize_step(tokens: int, folder: Path) -> dict[str, Any]:
    """Finalize simulated records: all that is not moving the chunks themselves."""
    from gristmill.data.preparation.finalize import finalize
    from gristmill.data.store.chunk_table import NAME as TABLE
    from gristmill.tokenizer.engines import EngineChoice

    plan = simulated_plan(tokens)
    space = simulated_space(folder)
    planned = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    made = finalize(plan, EngineChoice("fastokens", "0.3.5", "passed"), space, 0.001)
    seconds = time.perf_counter() - started
    return {
        "own_seconds": round(seconds, 1),
        "planned_mb": planned // 1000,
        "chunks": made["train"].totals.chunks,
        "table_bytes": (folder / "train" / TABLE).stat().st_size,
        "index_bytes": (folder / "train" / "index.json").stat().st_size,
    }


def simulated_space(folder: Path) -> Any:
    """A workspace that has every unit committed, and whose parts exist in its records only."""
    import numpy as np

    from gristmill.data.preparation.units import UnitRecord
    from gristmill.data.preparation.workspace import LocalWorkspace
    from gristmill.data.storage import Storage
    from gristmill.data.store.chunks import write_chunk

    scrap = folder / "scrap"
    scrap.mkdir()
    (scrap / "tokenizer").mkdir()
    small = np.zeros(8192, dtype=np.uint16)
    val = vars(write_chunk(scrap / "val-0.bin", [small], np.array([8192]), "uint16"))

    class Simulated(LocalWorkspace):
        tokenizer_dir = scrap / "tokenizer"

        def records(self, num_units: int) -> Iterator[UnitRecord]:
            for unit in range(num_units):
                yield UnitRecord.from_json(record_text(unit, val))

        def rejects(self, unit: int) -> bytes:
            return b'{"path": "a", "at": 1, "reason": "not JSON", "detail": ""}\n'

        def part(self, unit: int, name: str) -> Path:
            return scrap / "val-0.bin"

        def place(self, unit: int, name: str, target: str) -> None:
            pass

        def scratch(self) -> Path:
            return scrap

    return Simulated(Storage(folder))


def record_text(unit: int, val: dict[str, Any]) -> str:
    """The record of a unit with about four chunks of training and a little of validation."""
    left = int(UNIT_BYTES * TOKENS_PER_BYTE)
    parts = []
    while left > 0:
        tokens = min(left, CHUNK_TOKENS - 37 * len(parts) - unit % 1000)
        left -= tokens
        documents = tokens // 700
        part = {"name": f"train-{len(parts)}.bin", "tokens": tokens, "documents": documents}
        size = 4 * (documents + 2) + 2 * tokens
        part |= {"bytes": size, "xxh3": f"{unit:016x}{len(parts):016x}", "continues": False}
        parts.append(part)
    splits = [
        {"documents": 90_000, "text_bytes": UNIT_BYTES, "parts": parts},
        {"documents": 10, "text_bytes": 34_000, "parts": [val]},
    ]
    rest = {"rejects": {"not JSON": 1}, "empty_documents": 0, "filtered": 0, "quarantined": []}
    return json.dumps({"unit": unit, "splits": splits, **rest})


def open_step(tokens: int, folder: Path) -> dict[str, Any]:
    """Open what finalize described and find the samples of a step; chunks are not there."""
    import numpy as np

    from gristmill.data.reading.order import Order, samples_per_chunk
    from gristmill.data.store.dataset import Dataset

    dataset = Dataset.open(folder / "train")
    opened = time.perf_counter()
    order = Order(samples_per_chunk(dataset.chunk_tokens, 2048), 42)
    order.locate(np.arange(1024, dtype=np.int64) + order.num_samples // 2)
    return {
        "chunks": len(dataset.chunks),
        "seconds_to_first_batch": round(time.perf_counter() - opened, 3),
    }


if __name__ == "__main__":
    sys.exit(main())

"""How long a save holds training up: asynchronous against synchronous with fsync, pythia-160m.

    python benchmarks/checkpoint.py [--rounds 5] [--devices 1] [--dir DIRECTORY]

Both save the same model and AdamW state. `synchronous` is torch's own: every file written and
fsynced by `dcp.save` with the Hugging Face writer while training waits. `staged` is what the
training loop waits for in `Checkpointer.save`; the write goes on beside the steps, whose slowing is
measured too, as products of matrices per second with and without a write under way. With several
`--devices` the state is cut over as many processes (FSDP), each of which copies and writes its
part; times are those of the slowest.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gristmill.checkpoint.load import load, newest_good
from gristmill.checkpoint.ranks import Ranks
from gristmill.checkpoint.save import Checkpointer
from gristmill.checkpoint.state import model_state, optimizer_state
from gristmill.checkpoint.store import step_path
from gristmill.config.sections import AdamW, Parallel
from gristmill.launch.local import run_workers
from gristmill.launch.worker import die_with_parent, is_worker
from gristmill.models import zoo
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.optim.build import build_optimizer
from gristmill.parallel.mesh import Mesh, close_mesh, open_mesh
from gristmill.parallel.parallelize import parallelize
from gristmill.parallel.weights import materialize, put

MODEL = "pythia-160m"
CPU = torch.device("cpu")


def build(mesh: Mesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """This rank's part of a 160M-parameter model after one step: the optimizer has its state."""
    with torch.device("meta"):
        model = Decoder(zoo.get(MODEL))
    parallelize(model, mesh, CPU, compile="off")
    materialize(model, CPU)
    init_weights(model, seed=1, put=put)
    optimizer = build_optimizer(model, AdamW(), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save_synchronously(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> float:
    """Seconds that torch's own writer takes with training stopped."""
    mesh.barrier()
    started = time.perf_counter()
    parts = {"weights": model_state(model), "optimizer": optimizer_state(model, optimizer)}
    for name, state in parts.items():
        writer = HuggingFaceStorageWriter(str(path / name), save_distributed=True)
        dcp_save(dict(state), storage_writer=writer)
    return time.perf_counter() - started


def products_per_s(seconds: float | None, still_running: object = None) -> float:
    """Matrix products done in a second, for a time or for as long as a thread lives."""
    a = torch.randn(512, 512)
    started, num = time.perf_counter(), 0
    while True:
        torch.mm(a, a)
        num += 1
        elapsed = time.perf_counter() - started
        if seconds is not None and elapsed >= seconds:
            break
        if seconds is None and not still_running.is_alive():  # type: ignore[attr-defined]
            break
    return num / elapsed


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Measure and print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None)
    args = parser.parse_args()
    if is_worker():
        die_with_parent()
        run(args.dir, args.rounds)
        return
    work = Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=args.dir))
    try:
        if args.devices == 1:
            run(work, args.rounds)
        else:
            words = [__file__, "--rounds", str(args.rounds), "--dir", str(work)]
            run_workers(lambda _: [sys.executable, *words], args.devices, max_restarts=0)
    finally:
        shutil.rmtree(work)


def run(work: Path, rounds: int) -> None:
    """One warm-up save, then rounds in which each way of saving has its turn."""
    mesh = open_mesh(Parallel(), CPU)
    ranks = Ranks.open()
    model, optimizer = build(mesh)
    state = [*model_state(model).values(), *optimizer_state(model, optimizer).values()]
    total_bytes = sum(t.nbytes for t in state)
    checkpointer = Checkpointer(
        work / "run", keep_last=2, config=zoo.get(MODEL), ranks=Ranks.open()
    )
    table: dict[str, list[float]] = {
        name: [] for name in ("synchronous", "staged", "written", "slowing", "load")
    }
    before = resident_bytes()
    checkpointer.save(1, model, optimizer, {})  # buys the buffers
    checkpointer.wait()
    extra_bytes = resident_bytes() - before
    for step in range(2, rounds + 2):
        mesh.barrier()
        free = products_per_s(2.0)
        mesh.barrier()
        started = time.perf_counter()
        checkpointer.save(step, model, optimizer, {})
        table["staged"].append(time.perf_counter() - started)
        beside = products_per_s(None, checkpointer._thread)
        checkpointer.wait()
        table["written"].append(time.perf_counter() - started)
        table["slowing"].append(1 - beside / free)
        table["synchronous"].append(save_synchronously(work / "sync", model, optimizer, mesh))
        ranks.main_does(lambda: shutil.rmtree(work / "sync"))
        started = time.perf_counter()
        found = newest_good(work / "run", ranks)
        assert found == step_path(work / "run", step)
        load(found, model, optimizer, verified=True, ranks=ranks)
        table["load"].append(time.perf_counter() - started)
    assert not checkpointer.failed
    table = {name: ranks.largest(*values) for name, values in table.items()}
    extra_bytes = int(sum(ranks.gather(extra_bytes)))
    if mesh.is_main:
        show(table, mesh.world, total_bytes, extra_bytes)
    close_mesh(mesh)


def show(table: dict[str, list[float]], devices: int, total_bytes: int, extra_bytes: int) -> None:
    """Medians of the rounds as a table for people, then as one JSON line."""
    ratio = statistics.median(
        a / s for a, s in zip(table["staged"], table["synchronous"], strict=True)
    )
    medians = {name: statistics.median(values) for name, values in table.items()}
    rounds = len(table["staged"])
    print(
        f"{MODEL}: {total_bytes / 1e9:.2f} GB of state, {devices} processes, {rounds} rounds, "
        "medians"
    )
    print(f"  synchronous save with fsync      {medians['synchronous']:7.3f} s")
    print(f"  asynchronous: training waits     {medians['staged']:7.3f} s   ratio {ratio:.3f}")
    print(f"  asynchronous: on disk, verified  {medians['written']:7.3f} s")
    print(f"  other work beside the write      {medians['slowing']:7.1%} slower")
    print(f"  load, digests checked            {medians['load']:7.3f} s")
    print(f"  memory for saving                {extra_bytes / 1e9:7.2f} GB")
    result = {
        "benchmark": "checkpoint",
        "model": MODEL,
        "devices": devices,
        "state_bytes": total_bytes,
        "extra_memory_bytes": extra_bytes,
        "stall_ratio": ratio,
        **{f"{name}_s" if name != "slowing" else name: value for name, value in medians.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Memory and time of exports from a sharded training checkpoint: tiny-llama, 1.1 B parameters.

    python benchmarks/export.py [--dir DIRECTORY] [--max_shard_size 1500MB] [--litgpt PYTHON]

The checkpoint is as four processes write it: every tensor in four pieces, in four files of fp32.
Peaks are of whole processes, the interpreter and torch included. With `--litgpt`, the interpreter
of an environment with LitGPT, its `convert_from_litgpt` turns the same model into its kind of
Hugging Face weights. Needs 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from _common import Child, environment, gristmill, print_table, run_child
from safetensors.torch import save_file

from gristmill.checkpoint.store import write_record
from gristmill.config.model import ModelConfig
from gristmill.models import zoo
from gristmill.models.counts import num_parameters, parameter_shapes

MODEL = "tiny-llama-1.1b"
RANKS = 4


def write_checkpoint(path: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights, each rank's pieces in a file of its own."""
    (path / "weights").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for rank in range(RANKS):
        pieces, places = {}, {}
        for name, shape in parameter_shapes(config).items():
            rows = shape[0] // RANKS
            size = (rows, *shape[1:])
            pieces[name] = torch.randn(size, generator=generator).mul_(0.02)
            places[name] = {"saved_offsets": [rank * rows, *(0 for _ in shape[1:])]}
        metadata = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
        file = path / "weights" / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file(pieces, file, metadata=metadata)
        del pieces
    (path / "config.json").write_text(json.dumps({"gristmill": 1, **asdict(config)}))
    write_record(path, {"step": 1, "samples": 1, "tokens": 1, "optimizer": "AdamW"}, {})


def largest(folder: Path) -> int:
    """Bytes of the largest file."""
    return max(path.stat().st_size for path in folder.iterdir())


def export(source: Path, out: Path, log: Path, *options: str) -> Child:
    """Run `gristmill export` in a process of its own."""
    return run_child(gristmill("export", str(source), str(out), *options), log)


def main() -> None:
    """Measure and print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--max_shard_size", default="1500MB")
    parser.add_argument("--litgpt", default=None)
    parser.add_argument("--only_write", type=Path, default=None, help="the checkpoint, and end")
    args = parser.parse_args()
    if args.only_write is not None:
        write_checkpoint(args.only_write, zoo.get(MODEL))
        return
    work = Path(tempfile.mkdtemp(prefix="export-bench-", dir=args.dir))
    try:
        run(work, args.max_shard_size, args.litgpt)
    finally:
        shutil.rmtree(work)


def run(work: Path, max_shard_size: str, litgpt: str | None) -> None:
    """One export each, one after the other; what is not needed any more goes."""
    config = zoo.get(MODEL)
    checkpoint = work / "run" / "step-00000001"
    # In a process of its own: a child's peak begins with what its parent has in memory.
    run_child([sys.executable, __file__, "--only_write", str(checkpoint)], work / "write.log")
    idle = run_child([sys.executable, "-c", "import gristmill.formats.export"], work / "idle.log")
    rows: dict[str, tuple[Child, int]] = {}
    rows["hf fp32"] = (
        export(checkpoint, work / "hf", work / "hf.log", "--max_shard_size", max_shard_size),
        largest(work / "hf"),
    )
    shards = len(list((work / "hf").glob("*.safetensors")))
    shutil.rmtree(work / "hf")
    options = ("--max_shard_size", max_shard_size, "--dtype", "bfloat16")
    rows["hf bf16"] = (
        export(checkpoint, work / "hf", work / "hf16.log", *options),
        largest(work / "hf"),
    )
    shutil.rmtree(work / "hf")
    rows["litgpt fp32"] = (
        export(checkpoint, work / MODEL, work / "lit.log", "--format", "litgpt"),
        largest(work / MODEL),
    )
    shutil.rmtree(checkpoint)
    if litgpt is not None:
        command = [litgpt, "-m", "litgpt", "convert_from_litgpt", str(work / MODEL)]
        child = run_child([*command, str(work / "theirs")], work / "theirs.log")
        rows["LitGPT's convert_from_litgpt fp32"] = (child, largest(work / "theirs"))
    report(config, rows, idle, shards)


def report(
    config: ModelConfig, rows: dict[str, tuple[Child, int]], idle: Child, shards: int
) -> None:
    """The table and the JSON line."""
    print(
        f"{MODEL}: {num_parameters(config):,} parameters, checkpoint of {RANKS} files, "
        f"hf in {shards} shards; the process without a model: {idle.peak_bytes / 1e9:.2f} GB"
    )
    header = ("export to", "s", "peak GB", "largest file GB", "peak / largest")
    print_table(
        header,
        [
            (
                name,
                f"{child.seconds:.1f}",
                f"{child.peak_bytes / 1e9:.2f}",
                f"{size / 1e9:.2f}",
                f"{child.peak_bytes / size:.2f}",
            )
            for name, (child, size) in rows.items()
        ],
    )
    result = {
        "benchmark": "export",
        "model": MODEL,
        "idle_peak_bytes": idle.peak_bytes,
        "exports": {
            name: {"seconds": c.seconds, "peak_bytes": c.peak_bytes, "largest_file_bytes": size}
            for name, (c, size) in rows.items()
        },
        **environment(torch.get_num_threads()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

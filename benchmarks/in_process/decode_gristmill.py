"""What `gristmill generate` does after loading, told over stdin what to write.

    python decode_gristmill.py DIRECTORY THREADS [int8]

A line of stdin is {"prompts": [[id, ...], ...], "new": N, "compile": bool}; the answer is a line
with the ids and the seconds to the first and to the last of them. {"read": BYTES} reads a buffer
of that size and says the seconds: the memory bandwidth that the same threads have.
"""

import json
import sys
import time
from pathlib import Path

import torch

from gristmill.config.use_commands import Sampling
from gristmill.formats.model_dir import load_model
from gristmill.infer.quantize import quantize
from gristmill.models.batching import Batch, generate_batch
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, generate_tokens
from gristmill.models.kernels import use_kernels


def main(directory: str, threads: int, kind: str | None) -> None:
    """Answer lines until stdin ends."""
    torch.set_num_threads(threads)
    # What `infer.load.load` does; there is no tokenizer here.
    model = load_model(Path(directory), dtype=torch.bfloat16)
    use_kernels(model)
    if kind == "int8":
        quantize(model, "int8", torch.device("cpu"))
    buffers: dict[int, torch.Tensor] = {}
    kept: dict[tuple[int, bool], object] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "read" in job:
            out: dict[str, object] = {"seconds": read(buffers, job["read"])}
        else:
            out = answer(model, kept, job)
        print(json.dumps(out), flush=True)


def answer(model: Decoder, kept: dict, job: dict) -> dict[str, object]:
    """Greedy ids of each prompt."""
    prompts, new = job["prompts"], job["new"]
    key = len(prompts), job["compile"]
    if key not in kept and len(prompts) == 1:
        kept[key] = Context(model)
        if job["compile"]:
            kept[key].compile()
    elif key not in kept:
        kept[key] = Batch(model, len(prompts), len(prompts[0]) + new)
    ids: list[list[int]] = [[] for _ in prompts]
    first, start = 0.0, time.perf_counter()
    if len(prompts) == 1:
        kept[key].ids.clear()
        for token in generate_tokens(kept[key], prompts[0], max_new_tokens=new, temperature=0.0):
            ids[0].append(token)
            first = first or time.perf_counter() - start
    else:
        sampling = Sampling(max_new_tokens=new, temperature=0.0)
        seen = 0
        for number, item in generate_batch(kept[key], prompts, sampling):
            if isinstance(item, int):
                ids[number].append(item)
                seen += 1
                if seen == len(prompts):  # the first id of each
                    first = time.perf_counter() - start
    return {"first_s": first, "total_s": time.perf_counter() - start, "ids": ids}


def read(buffers: dict[int, torch.Tensor], num_bytes: int) -> float:
    """Seconds to read a buffer of that size once, at best."""
    if num_bytes not in buffers:
        buffers[num_bytes] = torch.ones(num_bytes // 4)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        buffers[num_bytes].sum()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)

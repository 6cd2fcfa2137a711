"""LitGPT's own generating functions, told over stdin what to write. Its `generate` calls them.

    PEER/bin/python decode_litgpt.py DIRECTORY THREADS

A line of stdin is {"prompts": [[id, ...], ...], "new": N, "compile": bool}; the answer is a line
with the ids and the seconds to the first and to the last of them.
"""

import json
import sys
import time
from pathlib import Path

import lightning as L
import torch
from litgpt.config import Config
from litgpt.generate import base
from litgpt.model import GPT
from litgpt.utils import load_checkpoint


def main(directory: Path, threads: int) -> None:
    """Answer lines until stdin ends."""
    torch.set_num_threads(threads)
    fabric = L.Fabric(devices=1, precision="bf16-true", accelerator="cpu")
    config = Config.from_file(directory / "model_config.yaml")
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    model.eval()
    model = fabric.setup_module(model)
    load_checkpoint(fabric, model, directory / "lit_model.pth")
    eager = base.next_token
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job["compile"] and base.next_token is eager:
            # As `litgpt generate --compile true` does.
            torch._dynamo.config.automatic_dynamic_shapes = True
            torch._inductor.config.coordinate_descent_tuning = True
            base.next_token = torch.compile(eager, mode="reduce-overhead")
        elif not job["compile"]:
            base.next_token = eager
        print(json.dumps(answer(model, job["prompts"], job["new"])), flush=True)


def answer(model: torch.nn.Module, prompts: list[list[int]], new: int) -> dict[str, object]:
    """Greedy ids of each prompt, all of one length."""
    tokens = torch.tensor(prompts)
    length = tokens.shape[1] + new
    model.max_seq_length = length
    model.set_kv_cache(batch_size=len(prompts))
    options = {"temperature": 0.0, "top_p": 0.0, "top_k": None}
    quiet = {"include_prompt": False, "include_eos": False}
    start = time.perf_counter()
    if len(prompts) == 1:
        stream = base.generate_fn(model, tokens[0], length, **options, **quiet)
    else:
        stream = base.batched_generate_fn(model, tokens, length, sample_args=options, **quiet)
    first, out = 0.0, []
    for token in stream:
        row = [token] if isinstance(token, torch.Tensor) else token
        out.append([int(one) for one in row])
        first = first or time.perf_counter() - start
    total = time.perf_counter() - start
    model.clear_kv_cache()
    return {"first_s": first, "total_s": total, "ids": [list(row) for row in zip(*out)]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

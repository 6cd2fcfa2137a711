"""`generate` of transformers, told over stdin what to write.

    python decode_transformers.py DIRECTORY THREADS

A line of stdin is {"prompts": [[id, ...], ...], "new": N, "compile": bool}; the answer is a line
with the ids and the seconds to the first and to the last of them. With `compile` the cache is
static, which is what makes `generate` compile its step.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


class FirstToken:
    """Sees each token as it is written, and remembers when the first one was."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0
        self.start = time.perf_counter()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """No row is done."""
        self.first = self.first or time.perf_counter() - self.start
        return torch.zeros(len(ids), dtype=torch.bool)


def main(directory: str, threads: int) -> None:
    """Answer lines until stdin ends."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        tokens = torch.tensor(job["prompts"])
        options = {"cache_implementation": "static"} if job["compile"] else {}
        first = FirstToken()
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=job["new"],
                min_new_tokens=job["new"],
                do_sample=False,
                stopping_criteria=[first],
                **options,
            )
        total = time.perf_counter() - first.start
        ids = out[:, tokens.shape[1] :].tolist()
        print(json.dumps({"first_s": first.first, "total_s": total, "ids": ids}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

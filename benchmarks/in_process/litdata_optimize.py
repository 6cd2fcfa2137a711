"""litdata's `optimize` over JSON lines: the loop that people write by hand around `tokenizers`.

    PEER/bin/python litdata_optimize.py TOKENIZER_DIR FOLDER OUT WORKERS

Prints JSON: seconds.
"""

from __future__ import annotations

import glob
import io
import json
import sys
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import zstandard
from litdata import optimize
from litdata.streaming import TokensLoader


def tokens(path: str, tokenizer: str) -> Iterator[np.ndarray]:
    """The ids of each document of a file, EOS after each."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(f"{tokenizer}/tokenizer.json").encode
    with open(path, "rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield np.array([*encode(json.loads(line)["text"]).ids, 0], dtype=np.uint16)


def main() -> None:
    """Prepare the .jsonl.zst files of a folder."""
    tokenizer_dir, folder, out, workers = sys.argv[1:]
    began = time.perf_counter()
    optimize(
        fn=partial(tokens, tokenizer=tokenizer_dir),
        inputs=sorted(glob.glob(f"{folder}/*.jsonl.zst")),
        output_dir=out,
        num_workers=int(workers),
        chunk_bytes="64MB",
        item_loader=TokensLoader(block_size=2049),
    )
    print("\n" + json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()

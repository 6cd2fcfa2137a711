"""LitGPT's TextFiles preparation, as its data module calls it, with as many workers as we say.

    PEER/bin/python litgpt_text_files.py TOKENIZER_DIR FOLDER OUT WORKERS

Its data module takes one core fewer than there are; everything else is as in LitGPT 0.5.13. Prints
JSON: seconds.
"""

from __future__ import annotations

import glob
import json
import sys
import time
from functools import partial

from litdata import optimize
from litdata.streaming import TokensLoader
from litgpt.data.text_files import tokenize
from litgpt.tokenizer import Tokenizer


def main() -> None:
    """Prepare the .txt files of a folder."""
    tokenizer_dir, folder, out, workers = sys.argv[1:]
    began = time.perf_counter()
    optimize(
        fn=partial(tokenize, tokenizer=Tokenizer(tokenizer_dir)),
        inputs=sorted(glob.glob(f"{folder}/*.txt")),
        output_dir=out,
        num_workers=int(workers),
        chunk_bytes="50MB",
        item_loader=TokensLoader(block_size=2049),
    )
    print("\n" + json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()

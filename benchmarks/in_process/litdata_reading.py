"""litdata's StreamingDataLoader over a token dataset, as LitGPT sets it up: tokens per second.

    PEER/bin/python litdata_reading.py DATASET SEQ_LEN BATCH WORKERS BATCHES

Prints JSON: tokens_per_s of the batches after the first twenty.
"""

from __future__ import annotations

import json
import sys
import time

from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader


def main() -> None:
    """Read batches and time them."""
    dataset, *numbers = sys.argv[1:]
    seq_len, batch, workers, batches = map(int, numbers)
    stream = StreamingDataset(
        input_dir=dataset, item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True
    )
    loader = StreamingDataLoader(stream, batch_size=batch, num_workers=workers, drop_last=True)
    read = 0
    began = time.perf_counter()
    for number, tokens in enumerate(loader):
        if number == 20:
            began, read = time.perf_counter(), 0
        read += tokens.shape[0] * seq_len
        if number == batches:
            break
    print("\n" + json.dumps({"tokens_per_s": read / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main()

"""Encodes text that is in memory and nothing else: how fast an engine is by itself.

    python bare_engine.py ENGINE TOKENIZER.json FOLDER PART PARTS

ENGINE is `fastokens` or `tokenizers`. Waits for a line on standard input, so that several begin
together, and prints JSON: seconds and tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

CALL_BYTES = 256_000  # the size at which both are fastest


def main() -> None:
    """Read a share of the documents, encode them, print how long that took."""
    engine, tokenizer, folder, part, parts = sys.argv[1:]
    texts = documents(Path(folder), int(part), int(parts))
    encode = {"fastokens": fastokens, "tokenizers": tokenizers}[engine](tokenizer)
    calls = batches(texts)
    encode(calls[0])
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    tokens = sum(encode(call) for call in calls)
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), flush=True)


def documents(folder: Path, part: int, parts: int) -> list[str]:
    """The texts of every `parts`-th file of JSON lines."""
    import orjson
    import zstandard

    texts = []
    for path in sorted(folder.glob("*.jsonl.zst"))[part::parts]:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            data = stream.read()
        texts += [orjson.loads(line)["text"] for line in data.splitlines()]
    return texts


def batches(texts: list[str]) -> list[list[str]]:
    """The texts in lists of about `CALL_BYTES`."""
    calls: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size > CALL_BYTES:
            calls.append([])
            size = 0
        calls[-1].append(text)
        size += len(text)
    return calls


def fastokens(tokenizer: str) -> Callable[[list[str]], int]:
    """The accelerated engine, on one thread."""
    from fastokens import Tokenizer

    library = Tokenizer.from_file(tokenizer)
    return lambda texts: len(library.encode_batch_flat(texts, split_special_tokens=True)[0]) // 4


def tokenizers(tokenizer: str) -> Callable[[list[str]], int]:
    """The definition, on one thread."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(tokenizer)
    return lambda texts: sum(
        len(e.ids) for e in library.encode_batch_fast(texts, add_special_tokens=False)
    )


if __name__ == "__main__":
    main()

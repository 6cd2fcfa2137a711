"""litdata reads what we write, and we read what it writes, token for token.

litdata lives in an environment of its own: GRISTMILL_LITDATA_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gristmill.cli import main
from gristmill.config.commands import Prepare
from gristmill.data.prepare import prepare
from gristmill.data.reading.stream import TokenStream
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError

READ = """
import json, sys
from litdata import StreamingDataset
from litdata.streaming.item_loader import TokensLoader
block = int(sys.argv[2])
data = StreamingDataset(sys.argv[1], item_loader=TokensLoader(block_size=block), shuffle=False)
print(json.dumps([data[i].tolist() for i in range(len(data))]))
"""

WRITE = """
import inspect, sys
import numpy as np, torch
from litdata import optimize
from litdata.streaming.item_loader import TokensLoader

def documents(n):
    return torch.arange(n * 100, n * 100 + 3 * n + 1, dtype=torch.int32)

if __name__ == "__main__":
    loader = {"item_loader": TokensLoader()} if sys.argv[2] == "tokens" else {}
    size = {"chunk_size": 500} if loader else {"chunk_bytes": "64MB"}
    packing = {} if sys.argv[3] == "None" else {"compression": sys.argv[3]}
    if packing and "compression_level" in inspect.signature(optimize).parameters:
        packing["compression_level"] = "chunk"
    optimize(fn=documents, inputs=list(range(40)), output_dir=sys.argv[1], num_workers=1, **size,
             **packing, **loader)
"""


@pytest.fixture(scope="session")
def litdata():
    """Runs a script where litdata is; the last line it prints."""
    return peers.peer("GRISTMILL_LITDATA_PYTHON", "import litdata")


def save_tokenizer(path: Path, first_id: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {f"unused {n}": n for n in range(first_id)}
    vocabulary |= {token: first_id + n for n, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path))


def blocks_of(dataset: Dataset, block: int = 33) -> list[list[int]]:
    """What litdata's token loader makes of these chunks."""
    return [
        dataset.map(n).tokens[start : start + block].tolist()
        for n, chunk in enumerate(dataset.chunks)
        for start in range(0, chunk.tokens - block + 1, block)
    ]


def documents_of(dataset: Dataset) -> list[list[int]]:
    documents = []
    for number in range(len(dataset.chunks)):
        mapped = dataset.map(number)
        starts = [0, *mapped.ends[:-1].tolist()]
        documents += [
            mapped.tokens[a:b].tolist() for a, b in zip(starts, mapped.ends.tolist(), strict=True)
        ]
    return documents


WRITTEN = [list(range(n * 100, n * 100 + 3 * n + 1)) for n in range(40)]


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
@pytest.mark.parametrize("first_id", [0, 65_500], ids=["uint16", "uint32"])
def test_litdata_reads_what_we_write(litdata, tmp_path, first_id, val_fraction):
    source = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{n} " + "word " * (n % 50)}) for n in range(400)]
    source.write_text("\n".join(lines))
    save_tokenizer(tmp_path / "tokenizer.json", first_id)
    out = tmp_path / "out"
    prepare(
        Prepare(
            layout="jsonl",
            input_dir=str(source),
            output_dir=str(out),
            tokenizer_dir=str(tmp_path),
            engine="tokenizers",
            num_workers=1,
            chunk_tokens=8192,
            val_fraction=val_fraction,
        )
    )
    for folder in [out / "train", out / "val"] if val_fraction else [out]:
        dataset = Dataset.open(folder)
        assert dataset.dtype == ("uint32" if first_id else "uint16")
        assert len(dataset.chunks) > 3 * (folder.name != "val")
        found = json.loads(litdata(tmp_path, READ, folder, 33))
        assert found == blocks_of(dataset)
        assert sum(map(len, found)) > 0.95 * dataset.num_tokens


def test_we_read_what_litdata_writes(litdata, tmp_path):
    out = tmp_path / "out"
    litdata(tmp_path, WRITE, out, "tokens", None)
    dataset = Dataset.open(out)
    assert dataset.dtype == "int32"
    assert dataset.num_documents == 40
    assert sorted(documents_of(dataset)) == WRITTEN
    assert dataset.num_token_ids == 39 * 100 + 3 * 39 + 1
    assert TokenStream(dataset, 16, seed=1).batch(0, 8).valid.all()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_imported_is_read_by_both(litdata, tmp_path, compression):
    """In place where it can be, linked, copied, and from the folders of two nodes."""
    for node in ("node-0", "node-1"):
        litdata(tmp_path, WRITE, tmp_path / "train" / node, "tokens", compression)
    kinds = {"copy": ("--copy",), "link": (), "place": ()}
    for kind in ("copy",) if compression else kinds:
        out = tmp_path / ("train" if kind == "place" else kind)
        place = ["--output_dir", str(out)] if kind != "place" else []
        assert main(["data", "import", str(tmp_path / "train"), *place, *kinds[kind]]) == 0
        dataset = Dataset.open(out)
        assert sorted(documents_of(dataset)) == sorted(WRITTEN * 2)
        assert main(["data", "verify", str(out)]) == 0
        assert json.loads(litdata(tmp_path, READ, out, 33)) == blocks_of(dataset)


def test_what_litdata_writes_without_its_token_loader_is_explained(litdata, tmp_path):
    out = tmp_path / "out"
    litdata(tmp_path, WRITE, out, "items", None)
    with pytest.raises(UserError, match=r"without item_loader=TokensLoader\(\) \(dim is null\)"):
        Dataset.open(out)

"""Stand-ins for what tutorials name: a hub on this machine, tiny models under the real names, and
small corpora that lie on the disk as the real ones do."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import zstandard
from tiny_names import VOCABULARY, tiny_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from gristmill.cli import main
from gristmill.formats import hf
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights


def _fake_hub() -> ModuleType:
    """The hub of the unit tests, whose folder must not be on the path: it has a `datasets.py`."""
    path = Path(__file__).parents[1] / "unit" / "data" / "fake_hub.py"
    spec = importlib.util.spec_from_file_location("fake_hub", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fake_hub = _fake_hub()


SHORT = ("--compile", "off", "--precision", "32-true", "--device", "cpu", "--eval.max_iters", "2")
"""What a test adds to a command that trains, beside the length of its run."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(small.WORDS) for _ in range(words)).capitalize() + "."


def texts(seed: int, count: int, words: int = 120) -> list[str]:
    return [text(1000 * seed + n, words) for n in range(count)]


def put_lines(path: Path, rows: list[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)


def put_table(path: Path, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def slimpajama(root: Path) -> None:
    """Three splits of compressed lines; half of the records are what StarCoder has better."""
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        rows = [
            {
                "text": value,
                "meta": {"redpajama_set_name": "RedPajamaGithub" if n % 4 == 3 else "RedPajamaC4"},
            }
            for n, value in enumerate(texts(len(split), count))
        ]
        put_lines(root / split / "chunk1" / f"example_{split}_0.jsonl.zst", rows)


def starcoder(root: Path) -> None:
    """A folder for each language."""
    for n, language in enumerate(("go", "python")):
        put_table(root / language / "train-00000-of-00001.parquet", content=texts(50 + n, 20))


REDPAJAMA = {
    "arxiv/arxiv_0.jsonl": "arxiv",
    "book/book.jsonl": "book",
    "c4/c4-train.00000-of-01024.jsonl": "c4",
    "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst": "common_crawl",
    "github/filtered_0.jsonl": "github",
    "stackexchange/stackexchange.jsonl": "stackexchange",
    "wikipedia/wiki.jsonl": "wikipedia",
}
SAMPLE = (
    "arxiv",
    "book",
    "c4",
    "cc_2019-30",
    "cc_2020-05",
    "cc_2021-04",
    "cc_2022-05",
    "cc_2023-06",
    "github",
    "stackexchange",
    "wikipedia",
)


def redpajama(root: Path) -> None:
    """The seven sets, as their makers' server gives them."""
    for n, name in enumerate(REDPAJAMA):
        put_lines(root / name, [{"text": t, "meta": {}} for t in texts(60 + n, 12)])


def redpajama_sample(root: Path) -> None:
    """The sample's eleven files."""
    for n, name in enumerate(SAMPLE):
        rows = [{"text": t, "meta": {}} for t in texts(80 + n, 12)]
        put_lines(root / f"{name}_sample.jsonl", rows)


def fineweb(root: Path) -> None:
    """Parquet files with more than the text."""
    for n in range(4):
        put_table(
            root / f"{n:03}_00000.parquet",
            text=texts(100 + n, 40),
            url=[f"https://example.org/{n}/{i}" for i in range(40)],
            language_score=[0.9] * 40,
        )


def folder_of_texts(root: Path, seed: int = 0) -> None:
    """Text files, as `custom_pretraining_data` has them."""
    root.mkdir(parents=True)
    for n in range(5):
        (root / f"combined_{n + 1}.txt").write_text(text(7000 + 10 * seed + n, 2000))


def _parquet(values: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": values}), out)
    return out.getvalue()


def _stories() -> bytes:
    """An archive of JSON arrays."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for n in range(2):
            rows = [{"story": value, "summary": "x"} for value in texts(120 + n, 30)]
            data = json.dumps(rows).encode()
            member = tarfile.TarInfo(f"data{n:02}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _instructions() -> bytes:
    """Records of the Alpaca set."""
    out = io.BytesIO()
    rows = {"instruction": texts(180, 80, 6), "input": [""] * 80, "output": texts(190, 80, 8)}
    pq.write_table(pa.table(rows), out)
    return out.getvalue()


def _chats() -> bytes:
    """Conversations of two turns."""
    out = io.BytesIO()
    roles = ("user", "assistant") * 2
    chats = [
        [{"role": role, "content": words} for role, words in zip(roles, texts(230 + n, 4, 6))]
        for n in range(20)
    ]
    pq.write_table(pa.table({"messages": chats}), out)
    return out.getvalue()


SPLITS = ("train", "validation")


def _hellaswag() -> bytes:
    """Questions with four endings."""
    out = io.BytesIO()
    count = 16
    rows = {
        "ind": list(range(count)),
        "activity_label": ["Milling"] * count,
        "ctx_a": texts(160, count, 12),
        "ctx_b": ["the miller"] * count,
        "endings": [texts(170 + n, 4, 6) for n in range(count)],
        "label": [str(n % 4) for n in range(count)],
    }
    pq.write_table(pa.table(rows), out)
    return out.getvalue()


def _model(name: str, tokenizer: dict[str, bytes]) -> dict[str, bytes]:
    """A Hugging Face directory with random weights, as bytes."""
    config = tiny_models()[name].config
    model = Decoder(config)
    init_weights(model, 1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        hf.write(out, config, model.state_dict(), tokenizer_dir=None)
        return {path.name: path.read_bytes() for path in out.iterdir()} | tokenizer


def sentencepiece_model(source: list[str], out: Path) -> None:
    """`tokenizer.model`, as LLaMA's is made."""
    import sentencepiece

    with out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(source),
            model_writer=file,
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )


@dataclass
class Tutorials:
    """What is made once: the files of the hub, and two tokenizers."""

    tokenizer: dict[str, bytes]
    sentencepiece: bytes
    models: dict[str, dict[str, bytes]]
    datasets: dict[str, dict[str, bytes]]

    def hub(self) -> Any:
        """A hub that holds them."""
        early = fake_hub.Repository(
            self.models["EleutherAI/pythia-14m"], revisions=("main", "step3000")
        )
        return fake_hub.Hub(
            models={"org/name": early}
            | {
                name: fake_hub.Repository(files, gated=name.startswith("meta-llama/"))
                for name, files in self.models.items()
            },
            datasets={name: fake_hub.Repository(files) for name, files in self.datasets.items()},
            tokens={"your_hf_token"},
        )


def make(folder: Path) -> Tutorials:
    """Everything, in a second or two."""
    small.write_novels(folder / "novels")
    small.train_tokenizer(folder / "novels", folder / "tokenizer")
    tokenizer = {name: (folder / "tokenizer" / name).read_bytes() for name in TOKENIZER_FILES}
    model = folder / "tokenizer.model"
    sentencepiece_model(texts(1, 400), model)
    llama2 = {
        "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
        "tokenizer.model": model.read_bytes(),
        "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}',
    }
    models = {
        "EleutherAI/pythia-14m": _model("pythia-14m", tokenizer),
        "EleutherAI/pythia-160m": _model("pythia-160m", tokenizer),
        "microsoft/phi-2": _model("phi-2", tokenizer),
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _model("tiny-llama-1.1b", tokenizer),
        "meta-llama/Llama-2-7b-hf": llama2,
        "meta-llama/Meta-Llama-3-8B": _model("Llama-3-8B", tokenizer),
    }
    datasets = {
        "Skylion007/openwebtext": {
            f"plain_text/train-{n:05}-of-00002.parquet": _parquet(texts(140 + n, 40))
            for n in range(2)
        },
        "Rowan/hellaswag": {
            f"data/{split}-00000-of-00001.parquet": _hellaswag() for split in SPLITS
        },
        "mhenrichsen/alpaca_2k_test": {"alpaca_2000.parquet": _instructions()},
        "HuggingFaceH4/deita-10k-v0-sft": {
            f"data/{split}_sft-00000-of-00001.parquet": _chats() for split in ("train", "test")
        },
        "roneneldan/TinyStories": {"TinyStories_all_data.tar.gz": _stories()},
    }
    return Tutorials(tokenizer, model.read_bytes(), models, datasets)


@contextlib.contextmanager
def at(folder: Path, made: Tutorials, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with the hub on this machine and tiny models."""
    models = tiny_models()
    monkeypatch.setattr("gristmill.models.zoo.models", lambda: models)
    monkeypatch.chdir(folder)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    # The library reads it when it is first imported, perhaps by another test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with made.hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield folder


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
"""A task of the harness that asks nothing of the hub."""


def put_task(folder: Path, name: str) -> None:
    """A task file and its data."""
    questions = texts(220, 6, 8)
    rows = [{"question": q, "choices": texts(n, 3, 3), "gold": 0} for n, q in enumerate(questions)]
    put_lines(folder / "data.jsonl", rows)
    text = TASK.format(name=name, file=(folder / "data.jsonl").resolve())
    (folder / f"{name}.yaml").write_text(text)


def is_used(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What every tutorial ends with: `chat` answers, `evaluate` measures, transformers loads."""
    talks(model, monkeypatch, capsys)
    Path("task").mkdir(exist_ok=True)
    put_task(Path("task"), "mills")
    out = Path(f"{model}-HF-checkpoint")
    line = f'litgpt evaluate {model} --batch_size 4 --tasks "mills" --out_dir {out}'
    assert run(line, "--include_path", "task", "--device", "cpu") == 0
    results = json.loads((out / "results.json").read_text())["results"]["mills"]
    assert 0 <= results["acc,none"] <= 1
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("the mill", return_tensors="pt")["input_ids"]
    assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3


def talks(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """`chat` answers, and an empty prompt leaves."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Why are LLMs so useful?\n\n"))
    capsys.readouterr()
    assert run(f"litgpt chat {model}", "--max_new_tokens", "5", "--precision", "32-true") == 0
    said = capsys.readouterr()
    assert "Now chatting with" in said.out
    assert "Time for inference" in said.err


HERE = """
import importlib.abc, importlib.util, sys

class Tiny(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "gristmill.models.zoo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then(module):
            execute(module)
            from tiny_names import tiny_models
            found = tiny_models()
            module.models = lambda: found

        spec.loader.exec_module = then
        return spec

sys.meta_path.insert(0, Tiny())
"""
"""What makes the named models tiny in another process, as its `sitecustomize`."""


def run_apart(line: str, *more: str, timeout: float = 900, **environment: str) -> str:
    """What a tutorial's command says in processes of its own, which end well."""
    site = Path("site")
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(HERE)
    own = [str(site.resolve()), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    found = os.pathsep.join(filter(None, own))
    done = subprocess.run(
        [sys.executable, "-m", "gristmill", *_words(line), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": found, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def run(line: str, *more: str) -> int:
    """The exit code of a tutorial's command line, with `gristmill` for `litgpt` or `python`."""
    return main([*_words(line), *more])


def _words(line: str) -> list[str]:
    words = shlex.split(line.replace("\\\n", " "))
    assert words[0] in ("litgpt", "python"), line
    return words[2:] if words[1] == "-m" else words[1:]

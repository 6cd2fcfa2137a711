"""A small tokenizer, a small corpus and small units of work for the tests of data/."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gristmill.config.commands import Prepare
from gristmill.data.preparation import plan
from gristmill.data.preparation.executors import local
from gristmill.data.preparation.workspace import JOB
from gristmill.data.prepare import prepare

WORDS = (Path(__file__).read_text(encoding="utf-8") + " été naïve 中文 🙂 forêt").split()


def make_text(seed: int, num_words: int) -> str:
    chosen = random.Random(seed)
    words = [chosen.choice(WORDS) for _ in range(num_words)]
    return " ".join(w + ("\n" if i % 11 == 10 else "") for i, w in enumerate(words))


def save_tokenizer(
    folder: Path, *, bos: str | None, eos: str | None, vocab_size: int = 400
) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(0, 3000)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with <s> (0) and </s> (1)."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos="<s>", eos="</s>")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of about 8 kB, so that a small corpus makes several."""
    monkeypatch.setattr(plan, "_MIN_UNIT_BYTES", 8000)
    monkeypatch.setattr(plan, "_UNITS_WANTED", 1000)


@pytest.fixture
def novels(tmp_path: Path) -> Path:
    """Twelve text files of different lengths in two folders, about 50 kB."""
    root = tmp_path / "novels"
    for number in range(12):
        folder = root / ("a" if number % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        text = make_text(number, 200 + 150 * number)
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A .jsonl file of 300 records, about 60 kB."""
    path = tmp_path / "records" / "all.jsonl"
    path.parent.mkdir()
    lines = [json.dumps({"id": n, "text": make_text(n, 5 + n % 60)}) for n in range(300)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Units run here, where they can be watched and disturbed."""
    monkeypatch.setattr(local, "run", lambda t, u, n, p: local.run_here(t, u, p))


class Preparation:
    """Runs `prepare` with the usual options of these tests."""

    def __init__(self, tokenizer_dir: Path) -> None:
        self.tokenizer_dir = tokenizer_dir

    def __call__(self, layout: str, source: Path, out: Path, **options: object) -> Path:
        settings: dict[str, object] = {"num_workers": 1, "engine": "tokenizers"}
        settings |= {"tokenizer_dir": str(self.tokenizer_dir)}
        prepare(
            Prepare(layout=layout, input_dir=str(source), output_dir=str(out), **settings | options)
        )
        return out


@pytest.fixture
def run_prepare(tokenizer_dir: Path) -> Preparation:
    return Preparation(tokenizer_dir)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes, without the note of when inputs were changed."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != JOB
    }

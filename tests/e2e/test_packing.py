"""Training on packed rows of whole documents, through the command line."""

import json
import math
import shutil

import pytest
from small import MODEL, train_tokenizer, write_novels

from gristmill.cli import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset of 180 short lines and a long one, with a validation side."""
    root = tmp_path_factory.mktemp("packing")
    tokenizer = train_tokenizer(write_novels(root / "novels"), root / "tokenizer")
    words = (root / "novels" / "novel-00.txt").read_text().split()
    texts = [" ".join(words[n : n + 3 + n % 20]) for n in range(180)] + [" ".join(words[:300])]
    lines = [json.dumps({"text": text}) for text in texts]
    (root / "raw").mkdir()
    (root / "raw" / "all.jsonl").write_text("\n".join(lines) + "\n")
    command = ["prepare", "jsonl", "--input_dir", str(root / "raw"), "--val_fraction", "0.1"]
    command += ["--output_dir", str(root / "data"), "--tokenizer_dir", str(tokenizer)]
    assert main(command) == 0
    return root / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "packing-cache"))


def pretrain(data, out, *more, packing="best_fit"):
    model = [f"--model_config.{name}={value}" for name, value in MODEL.items()]
    return main(
        [
            *("pretrain", *model, "--data", "LitData", "--data.path", str(data)),
            *("--out_dir", str(out), "--compile", "off", "--precision", "32-true"),
            *("--train.global_batch_size", "4", "--device", "cpu", "--train.packing", packing),
            *more,
        ]
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_packed_run_says_what_packing_does_and_goes_on(prepared, tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain(prepared, out, "--train.max_steps", "6") == 0
    shown = capsys.readouterr().out
    assert "% padding, " in shown
    assert "longer than a sample and cut" in shown
    assert pretrain(prepared, out, "--train.max_steps", "12") == 0
    losses = {row["step"]: row["loss"] for row in rows(out) if "loss" in row}
    assert list(losses) == list(range(1, 13))
    assert all(map(math.isfinite, losses.values()))
    assert losses[12] < losses[1]
    # The other samples are another run.
    assert pretrain(prepared, out, "--train.max_steps", "13", packing="concat") == 2
    assert "train.packing: best_fit -> concat" in capsys.readouterr().err


def test_validation_is_the_same_whatever_the_packing(prepared, tmp_path):
    first = []
    for packing in ("concat", "best_fit"):
        out = tmp_path / packing
        assert pretrain(prepared, out, "--train.max_steps", "1", packing=packing) == 0
        first.append(next(row["val_loss"] for row in rows(out) if "val_loss" in row))
    assert first[0] == first[1]


def test_documents_that_are_not_kept_apart_are_not_packed(prepared, tmp_path, capsys):
    assert pretrain(prepared, tmp_path / "run", "--train.document_mask", "false") == 2
    assert "--train.document_mask false lets them look at each other" in capsys.readouterr().err
    adopted = tmp_path / "adopted"
    shutil.copytree(prepared / "train", adopted)
    for name in ("manifest.json", "chunks.npy", "README.md"):
        (adopted / name).unlink()
    assert pretrain(adopted, tmp_path / "run", "--train.max_steps", "2") == 2
    assert "--train.document_mask true" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    typed = ("--train.max_steps", "2", "--train.document_mask", "true")
    assert pretrain(adopted, tmp_path / "run", *typed) == 0

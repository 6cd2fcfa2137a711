"""From raw corpus to a model that talks: *Pretrain TinyLlama*, *Pre-train LLaMA on RedPajama*."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import tutorial_world as world
from small import metrics
from transformers import AutoModelForCausalLM
from tutorial_world import SHORT, run, run_apart

from gristmill.cli import main
from gristmill.data.store.dataset import Dataset
from gristmill.formats.model_dir import open_model_dir

pytestmark = pytest.mark.slow

# The runs as they stand, of a length for a test.
STEPS = (
    *("--train.max_seq_length", "64", "--train.global_batch_size", "4"),
    *("--train.micro_batch_size", "4", "--train.save_interval", "3"),
)


def prepare_tinyllama(place, capsys) -> None:
    """Tokenizer and both corpora, as the tutorial prepares them."""
    world.slimpajama(place / "data/slimpajama-raw")
    world.starcoder(place / "data/starcoderdata-raw")
    assert run("python scripts/download.py") == 0
    listed = capsys.readouterr().out.splitlines()
    assert "meta-llama/Llama-2-7b-hf" in listed
    line = """python scripts/download.py \\
   --repo_id meta-llama/Llama-2-7b-hf \\
   --access_token your_hf_token \\
   --tokenizer_only true"""
    assert run(line.replace("your_hf_token", "another")) == 2  # gated
    assert run(line) == 0
    assert "another" not in capsys.readouterr().err
    line = """python scripts/prepare_starcoder.py \\
  --input_dir data/starcoderdata-raw \\
  --output_dir data/starcoder \\
  --tokenizer_path checkpoints/Llama-2-7b-hf"""
    assert run(line.replace("data/starcoder ", "data/slice "), "--fast_dev_run=true") == 0
    # The download is in checkpoints/meta-llama/: the tutorial leaves that out.
    assert run(line) == 0
    for theirs, ours in (("validation", "val"), ("test", "test"), ("train", "train")):
        line = f"""python scripts/prepare_slimpajama.py \\
  --input_dir data/slimpajama-raw/{theirs} \\
  --output_dir data/slimpajama/{ours} \\
  --tokenizer_path checkpoints/Llama-2-7b-hf"""
        assert run(line) == 0
    train = Dataset.open(place / "data/slimpajama/train")
    assert train.num_documents == 30  # a quarter is GitHub's
    assert train.dtype == "uint16"  # half of what the script takes


def test_the_way_of_tinyllama(place, monkeypatch, capsys):
    prepare_tinyllama(place, capsys)
    line = "python pretrain/tinyllama.py"
    capsys.readouterr()
    assert run(line, *SHORT, *STEPS, "--train.max_steps", "6") == 0
    said = capsys.readouterr()
    assert "gristmill pretrain --config pretrain/tinyllama" in said.err
    out = place / "out/tiny-llama-1.1b"
    rows = metrics(out)
    assert {"slimpajama", "starcoder"} <= set(re.findall(r"slimpajama|starcoder", said.out))
    assert rows[-1]["step"] == 6

    # The step's number, and a longer run: there is something to go on with.
    line = "python pretrain/tinyllama.py --resume out/tiny-llama-1.1b/step-00060500.pth"
    line = line.replace("60500", "00006")
    assert run(line, *SHORT, *STEPS, "--train.max_steps", "9") == 0
    assert [r["step"] for r in metrics(out) if "loss" in r] == list(range(1, 10))

    line = """python scripts/convert_pretrained_checkpoint.py \\
  --checkpoint_file out/tiny-llama-1.1b/step-00060500.pth \\
  --tokenizer_dir checkpoints/meta-llama/Llama-2-7b-hf \\
  --config_name tiny-llama-1.1b \\
  --output_dir checkpoints/lit-tiny-llama-1.1b"""
    line = line.replace("60500", "00009")
    assert run(line.replace("config_name tiny-llama-1.1b", "config_name pythia-14m")) == 2
    assert "is no pythia-14m" in capsys.readouterr().err
    assert run(line) == 0
    made = place / "checkpoints/lit-tiny-llama-1.1b"
    assert {"lit_model.pth", "tokenizer.model", "tokenizer_config.json"} <= {
        path.name for path in made.iterdir()
    }
    AutoModelForCausalLM.from_pretrained(out / "final")
    one, two = open_model_dir(made).parameters(), open_model_dir(out).parameters()
    assert all(torch.equal(one[name], two[name]) for name in one)
    world.is_used("checkpoints/lit-tiny-llama-1.1b", monkeypatch, capsys)


def test_a_bare_training_checkpoint_is_converted_by_name(place):
    """The file of an old training, without a configuration beside it."""
    run("litgpt download TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    source = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    assert run(f"litgpt convert_pretrained_checkpoint {source} converted") == 0
    state = torch.load("converted/lit_model.pth", weights_only=True)
    Path("old").mkdir()
    torch.save({"model": state, "iter_num": 3, "step_count": 1}, "old/step-00060500.pth")
    line = """python scripts/convert_pretrained_checkpoint.py \\
  --checkpoint_file old/step-00060500.pth \\
  --tokenizer_dir checkpoints/TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T \\
  --config_name tiny-llama-1.1b \\
  --output_dir checkpoints/lit-tiny-llama-1.1b"""
    assert run(line) == 0
    again = torch.load("checkpoints/lit-tiny-llama-1.1b/lit_model.pth", weights_only=True)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_the_authors_own_spellings(place):
    """TinyLlama's scripts, whose options LitGPT's do not have."""
    world.slimpajama(place / "SlimPajama")
    run("litgpt download EleutherAI/pythia-14m --tokenizer_only true")
    line = (
        "python scripts/prepare_slimpajama.py --source_path SlimPajama --tokenizer_path "
        "EleutherAI/pythia-14m --destination_path data/slim --split validation --percentage 1.0"
    )
    assert run(line) == 0
    assert Dataset.open(place / "data/slim").num_documents == 9


def test_the_way_of_lit_llama(place, tutorials, monkeypatch, capsys):
    world.redpajama(place / "data/RedPajama-Data-1T")
    world.redpajama_sample(place / "data/RedPajama-Data-1T-Sample")
    tokenizer = place / "checkpoints/lit-llama/tokenizer.model"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes(tutorials.sentencepiece)
    line = (
        "python scripts/prepare_redpajama.py --source_path data/RedPajama-Data-1T "
        "--tokenizer_path checkpoints/lit-llama/tokenizer.model "
        "--destination_path data/lit-redpajama"
    )
    assert run(line) == 0
    assert len(list((place / "data/lit-redpajama").glob("*/index.json"))) == 7
    line = (
        "python scripts/prepare_redpajama.py --source_path data/RedPajama-Data-1T-Sample "
        "--tokenizer_path checkpoints/lit-llama/tokenizer.model "
        "--destination_path data/lit-redpajama-sample --sample True"
    )
    assert run(line) == 0
    assert len(list((place / "data/lit-redpajama-sample").glob("*/index.json"))) == 11

    capsys.readouterr()
    line = "python train_redpajama.py --devices 4 --train_data_dir data/lit-redpajama"
    # In this process only one of the four; the next command has them all.
    assert run(line, *SHORT, *STEPS, "--devices", "1", "--train.max_steps", "4") == 0
    said = capsys.readouterr().out
    shares = dict(re.findall(r"(arxiv|common_crawl|wikipedia) (\d+\.\d\d)", said))
    # All sets have about as many tokens: common crawl, which lit-llama lost, is read most.
    assert float(shares["common_crawl"]) > 5 * float(shares["arxiv"])
    out = place / "out/training"
    assert json.loads((out / "final/config.json").read_text())["model_type"] == "llama"
    line = "python train_redpajama.py --devices 4 --train_data_dir data/lit-redpajama-sample"
    more = ("--train.micro_batch_size", "1", "--train.max_steps", "3", "--out_dir", "out/sample")
    said = run_apart(line, *SHORT, *STEPS, *more)
    assert "cc_2019-30_sample" in said
    assert [r["step"] for r in metrics(place / "out/sample") if "loss" in r] == [1, 2, 3]
    world.is_used("out/training", monkeypatch, capsys)
    AutoModelForCausalLM.from_pretrained(out / "final")


def packed(path: Path, tokens: int) -> None:
    """A file as lit-llama's and TinyLlama's scripts wrote them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"LITPKDS" + (1).to_bytes(8, "little") + b"\x08" + tokens.to_bytes(8, "little")
    ids = random.Random(path.name).choices(range(3, 300), k=tokens)
    path.write_bytes(header + b"".join(i.to_bytes(2, "little") for i in ids))


def import_as_told(capsys, *more: str) -> None:
    """Run the command that the message before ends with."""
    found = re.search(
        r"gristmill (data import \S+ --copy) --output_dir NEW", capsys.readouterr().err
    )
    assert main([*found[1].split(), *more]) == 0


def test_packed_files_of_lit_llama(place, capsys):
    """The sets that its script had written are told apart, and mixed as its trainer does."""
    for name in ("arxiv", "book", "common_crawl", "wikipedia"):
        for number in range(2):
            packed(place / f"data/lit-redpajama/{name}_{number:010}.bin", 2000)
    line = "python train_redpajama.py --devices 1 --train_data_dir data/lit-redpajama"
    assert run(line, *SHORT) == 2
    import_as_told(capsys, "--output_dir", "data/redpajama")
    line = line.replace("lit-redpajama", "redpajama")
    assert run(line, *SHORT, *STEPS, "--train.max_steps", "2") == 0
    shares = dict(re.findall(r"(arxiv|common_crawl|book) (\d+\.\d\d)", capsys.readouterr().out))
    assert float(shares["common_crawl"]) > 3 * float(shares["book"])  # of as many tokens


def test_packed_files_of_tinyllama_s_authors(place, capsys):
    """One folder for all: training and validation, both corpora, a prefix for each process."""
    for process in range(2):
        for name in ("train_slimpajama", "train_starcoder", "validation_slimpajama"):
            packed(place / f"data/slim_star/{name}_{process}_{0:010}.bin", 2000)
    more = "--devices 1 --train_data_dir data/slim_star --val_data_dir data/slim_star"
    assert run(f"python pretrain/tinyllama.py {more}", *SHORT) == 2
    import_as_told(capsys, "--output_dir", "data")
    # Where the recipe of the script looks for the two corpora.
    length = ("--train.max_steps", "2", "--eval.interval", "1")
    assert run("python pretrain/tinyllama.py", *SHORT, *STEPS, *length) == 0
    assert {"slimpajama", "starcoder"} <= set(capsys.readouterr().out.split())
    assert any("val_loss" in row for row in metrics(place / "out/tiny-llama-1.1b"))

    more = "--train_data_dir=data/starcoder --val_data_dir=data/slimpajama"
    line = f"python pretrain/tinyllama.py {more} --out_dir out/one"
    assert run(line, *SHORT, *STEPS, *length) == 0
    assert any("val_loss" in row for row in metrics(place / "out/one"))

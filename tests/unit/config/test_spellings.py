"""The commands that other tools' tutorials write mean the same here."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from gristmill.config import data
from gristmill.config.commands import Download, Prepare, Pretrain, RayCluster, TokenizerTrain
from gristmill.config.parse import parse, to_yaml
from gristmill.data.raw import layouts
from gristmill.util.errors import UserError


def prepare(line):
    words = shlex.split(line)
    return parse(Prepare, words, prog="gristmill prepare", positionals=("layout", "output_dir"))


def pretrain(line):
    return parse(
        Pretrain, shlex.split(line), prog="gristmill pretrain", positionals=("model_name",)
    )


def download(line):
    return parse(Download, shlex.split(line), prog="gristmill download", positionals=("repo_id",))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (  # LitGPT's prepare_slimpajama.py
            "slimpajama --input_dir data/slimpajama-raw/validation "
            "--output_dir data/slimpajama/val --tokenizer_path checkpoints/Llama-2-7b-hf",
            Prepare(
                layout="slimpajama",
                input_dir="data/slimpajama-raw/validation",
                output_dir="data/slimpajama/val",
                tokenizer_dir="checkpoints/Llama-2-7b-hf",
            ),
        ),
        (  # the same, tried out; the sizes of its own chunks
            "slimpajama --input_dir i --output_dir o --tokenizer_path t --fast_dev_run=true "
            "--chunk_size 33570816",
            Prepare(
                layout="slimpajama",
                input_dir="i",
                output_dir="o",
                tokenizer_dir="t",
                fast_dev_run=True,
                chunk_tokens=33570816,
            ),
        ),
        (  # TinyLlama's scripts
            "starcoder --source_path s --tokenizer_path t --destination_path d --split train",
            Prepare(
                layout="starcoder", input_dir="s", tokenizer_dir="t", output_dir="d", split="train"
            ),
        ),
        (  # lit-llama's prepare_redpajama.py
            "redpajama --source_path data/RedPajama-Data-1T-Sample "
            "--tokenizer_path checkpoints/lit-llama/tokenizer.model "
            "--destination_path data/lit-redpajama-sample --sample True --match arxiv",
            Prepare(
                layout="redpajama",
                input_dir="data/RedPajama-Data-1T-Sample",
                tokenizer_dir="checkpoints/lit-llama/tokenizer.model",
                output_dir="data/lit-redpajama-sample",
                sample=True,
                pattern="arxiv",
            ),
        ),
        (  # optimize_dataset.py of the Ray guide
            'fineweb --input_dir="/efs/fineweb/sample_fine_web_10BT" '
            '--tokenizer_dir="/efs/Meta-Llama-3-8B" --output_dir="/efs/optimized-dataset" '
            "--executor ray --ray.address auto --val_fraction 0.01",
            Prepare(
                layout="fineweb",
                input_dir="/efs/fineweb/sample_fine_web_10BT",
                tokenizer_dir="/efs/Meta-Llama-3-8B",
                output_dir="/efs/optimized-dataset",
                executor="ray",
                ray=RayCluster(address="auto"),
                val_fraction=0.01,
            ),
        ),
        ("status data/o", Prepare(layout="status", output_dir="data/o")),
    ],
)
def test_preparation(line, expected):
    assert prepare(line) == expected


def test_a_filter_is_data():
    given = '{"meta.lang": "en", "set": {"not_in": ["a", "b"]}, "score": {"min": 0.5}}'
    cfg = prepare(f"jsonl --filter '{given}'")
    assert cfg.filter == {
        "meta.lang": "en",
        "set": {"not_in": ["a", "b"]},
        "score": {"min": 0.5},
    }


def test_a_configuration_of_a_preparation_is_read_back(tmp_path):
    cfg = prepare('jsonl --input_dir i --filter \'{"a.b": {"in": [1]}}\' --ray.num_cpus 2')
    (tmp_path / "p.yaml").write_text(to_yaml(cfg))
    assert prepare(f"--config {tmp_path}/p.yaml") == cfg


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("starcoder --percentage 0.5", r"unknown option --percentage\. Choose files by --pattern"),
        ("jsonl out more", "unexpected word 'more'"),
        ("jsonl --sample perhaps", "--sample perhaps .* true or false"),
        ("jsonl --chunk_size many", "--chunk_tokens many .* whole number"),
    ],
)
def test_mistakes_in_preparation(line, expected):
    with pytest.raises(UserError, match=expected):
        prepare(line)


def test_a_spelling_counts_only_where_it_means_something():
    with pytest.raises(UserError, match="unknown option --match"):
        pretrain("pythia-14m --match x")
    assert parse(
        TokenizerTrain, ["--source_path", "i"], prog="gristmill tokenizer train", positionals=()
    ) == TokenizerTrain(input_dir="i")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "EleutherAI/pythia-14m --tokenizer_only true",
            Download(repo_id="EleutherAI/pythia-14m", tokenizer_only=True),
        ),
        (
            "--repo_id meta-llama/Llama-2-7b-hf --access_token your_hf_token --tokenizer_only true",
            Download(
                repo_id="meta-llama/Llama-2-7b-hf",
                access_token="your_hf_token",
                tokenizer_only=True,
            ),
        ),
        (
            "HuggingFaceFW/fineweb --repo_type dataset --pattern 'sample/10BT/*'",
            Download(repo_id="HuggingFaceFW/fineweb", repo_type="dataset", pattern="sample/10BT/*"),
        ),
        ('a/b --pattern \'["*.json", "x"]\'', Download(repo_id="a/b", pattern=["*.json", "x"])),
        ("--urls urls.txt --out_dir data/r", Download(urls="urls.txt", out_dir="data/r")),
    ],
)
def test_downloads(line, expected):
    assert download(line) == expected


def test_a_printed_configuration_leaves_the_token_out(capsys):
    with pytest.raises(SystemExit):
        download("a/b --access_token hf_secret --print_config")
    said = capsys.readouterr().out
    assert "repo_id: a/b" in said
    assert "hf_secret" not in said


def test_a_mistake_beside_a_token_does_not_show_it():
    with pytest.raises(UserError) as wrong:
        download("a/b --acces_token=hf_secret")
    assert "hf_secret" not in str(wrong.value)
    with pytest.raises(UserError) as wrong:
        download("a/b --access_token=hf_secret --num_workers x")
    assert "hf_secret" not in str(wrong.value)
    with pytest.raises(UserError, match="Nothing needs converting"):
        download("a/b --convert_checkpoint false")


@pytest.mark.parametrize("name", ["OpenWebText", "TinyStories"])
def test_modules_of_litgpt_with_their_own_settings(name, tmp_path):
    expected = getattr(data, name)(train_data_path="d", val_fraction=0.1)
    line = "--data.data_path d --data.val_split_fraction 0.1"
    assert pretrain(f"x --data {name} {line}").data == expected
    assert pretrain(f"x --data litgpt.data.{name} {line}").data == expected
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data:\n  class_path: litgpt.data.{name}\n"
        "  init_args:\n    data_path: d\n    val_split_fraction: 0.1\n"
    )
    assert pretrain(f"--config {config}").data == expected
    config.write_text(f"data: litgpt.data.{name}\n")
    assert pretrain(f"--config {config} {line}").data == expected
    assert pretrain("x --data LitData --data.data_path d").data == data.LitData(data_path="d")


def test_the_default_places_are_those_of_litgpt():
    assert data.OpenWebText().train_data_path == "data/openwebtext"
    assert data.TinyStories().train_data_path == "data/tinystories"
    assert data.OpenWebText().val_fraction == 0.0005


RAW = [
    data.TextFiles,
    data.Jsonl,
    data.Parquet,
    data.FineWeb,
    data.SlimPajama,
    data.StarCoder,
    data.OpenWebText,
    data.TinyStories,
]


@pytest.mark.parametrize("module", RAW)
def test_a_module_says_what_its_layout_says(module):
    layout = layouts.get(module.layout)
    defaults = {f.name: f.default for f in dataclasses.fields(module)}
    assert defaults["pattern"] == layout.pattern
    assert defaults.get("text_field", "text") == layout.text_field
    assert pretrain(f"x --data {module.__name__} --data.train_data_path d").data == module(
        train_data_path="d"
    )

"""Scripts of other tools' tutorials: which command here each line means."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from gristmill import cli
from gristmill.cli import COMMANDS, _command_name, _listing, main
from gristmill.config import data
from gristmill.config.parse import parse
from gristmill.config.scripts import SCRIPTS, named, on_ray, translate
from gristmill.util.errors import UserError


def meant(line: str) -> str:
    return shlex.join(translate(shlex.split(line)))


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.setattr("gristmill.config.scripts.on_ray", lambda: False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("scripts/download.py", "download"),
        ("scripts/prepare_starcoder.py --input_dir d", "prepare starcoder --input_dir d"),
        ("prepare_slimpajama --percentage 1.0 --split train", "prepare slimpajama --split train"),
        ("prepare_slimpajama --percentage=1.0", "prepare slimpajama"),
        ("prepare_slimpajama --percentage 0.5", "prepare slimpajama --percentage 0.5"),
        (
            "pretrain/tinyllama.py --resume out/x/step-00060500.pth",
            "pretrain --config pretrain/tinyllama --out_dir out/tiny-llama-1.1b "
            "--resume out/x/step-00060500.pth",
        ),
        (
            "tinyllama --devices 8 --train_data_dir d --val_data_dir v --tpu False",
            "pretrain --config pretrain/tinyllama --out_dir out/tiny-llama-1.1b "
            "--devices 8 --data LitData --data.data_path d --data.val_data_path v",
        ),
        (
            "pretrain/redpajama.py --train_data_dir=d --val_data_dir=v",
            "pretrain --config pretrain/llama-7b-redpajama --out_dir out/training "
            "--data RedPajama --data.data_path=d --data.val_data_path=v",
        ),
        (
            "optimize_dataset.py --output_dir=o",
            "prepare fineweb --val_fraction 0.005 --output_dir=o",
        ),
        ("optimize_dataset --val_fraction 0.3", "prepare fineweb --val_fraction 0.3"),
        (
            "distributed_pretrain.py --dataset_path=d --num_nodes=4",
            "pretrain --launcher ray --data LitData --data.data_path=d --num_nodes=4",
        ),
        ("lightning.pytorch.utilities.consolidate_checkpoint d/", "consolidate_checkpoint d/"),
        ("lightning.fabric.utilities.consolidate_checkpoint d", "consolidate_checkpoint d"),
        ("convert_pretrained_checkpoint.py a b", "convert_pretrained_checkpoint a b"),
        ("pretrain pythia-14m --train_data_dir d", "pretrain pythia-14m --train_data_dir d"),
        ("", ""),
    ],
)
def test_what_a_line_means(line, expected):
    assert meant(line) == expected


def test_a_cluster_and_a_tracker_are_used_where_they_are(monkeypatch):
    monkeypatch.setattr("gristmill.config.scripts.on_ray", lambda: True)
    assert "--executor ray" in meant("optimize_dataset.py --output_dir=o")
    assert "ray" not in meant("optimize_dataset.py --output_dir=o --executor local")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    said = meant("distributed_pretrain.py --model_name x")
    assert "--logger_name wandb" in said
    assert "secret" not in said
    assert "wandb" not in meant("distributed_pretrain.py --logger_name csv --out_dir o").split()[:3]


def test_a_ray_cluster_is_believed_where_the_user_began_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not on_ray()
    (tmp_path / "ray").mkdir()
    file = tmp_path / "ray" / "ray_current_cluster"
    file.write_text("127.0.0.1:6379")
    assert on_ray()
    monkeypatch.setattr("os.geteuid", lambda: file.stat().st_uid + 1)
    assert not on_ray()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert on_ray()


def test_scripts_hide_no_command():
    assert not set(SCRIPTS) & set(COMMANDS)
    assert {named(word) for word in ("scripts/a_b.py", "a.b", "chat")} == {"a_b", "a.b", "chat"}


def test_what_is_run_is_said(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", lambda words: 0)
    assert main(["scripts/prepare_redpajama.py", "--source_path", "my corpus"]) == 0
    said = capsys.readouterr().err
    assert "gristmill prepare redpajama --source_path 'my corpus'" in said
    assert main(["scripts/download.py"]) == 0
    assert not capsys.readouterr().err


def test_a_mistake_is_corrected_in_words_of_ours(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare_slimpajama", "--input_dir", "raw", "--percentage", "0.5"]) == 2
    assert "Choose files by --pattern" in capsys.readouterr().err
    assert main(["prepare_slimpyjama"]) == 2
    assert "Did you mean prepare_slimpajama" in capsys.readouterr().err


def config_of(words: list[str]) -> object:
    """The settings that a command line means; None for a list."""
    name, rest = _command_name(words)
    command = COMMANDS[name]
    if _listing(command, rest) is not None:
        return None
    module, _, attribute = command.config.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    return parse(kind, rest, prog=f"gristmill {name}", positionals=command.positionals)


def lines_of(page: Path) -> list[str]:
    """The command lines of a tutorial: what stands in its blocks, and litgpt's in its prose."""
    text = re.sub(r"\\\n", " ", page.read_text(errors="replace"))
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(litgpt [a-z][^`]*)`", text)
    return [line for line in lines if re.match(r"(litgpt|python) ", line)]


def test_every_line_of_the_tutorials_is_understood(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = sorted((shared / "tutorials").glob("*.md"))
    seen = 0
    for line in (line for page in pages for line in lines_of(page)):
        words = shlex.split(line.partition("|")[0])
        words = words[3:] if words[1] == "-m" else words[1:]
        if "--help" in words or "--data.help" in words:
            continue
        if line.startswith("python -m"):
            words = ["lightning.pytorch.utilities.consolidate_checkpoint", *words]
        try:
            config_of(translate(words))
        except UserError as error:
            raise AssertionError(f"{line}: {error}") from None
        seen += 1
    assert seen > 30


def test_a_recipe_s_warmup_gives_way_to_a_shorter_run():
    def warmup(*words: str) -> object:
        return config_of(["pretrain", *words]).train.lr_warmup_steps

    recipe = ("--config", "pretrain/debug")
    assert warmup(*recipe) == 100
    assert warmup(*recipe, "--train.max_steps", "5") == "auto"
    assert warmup(*recipe, "--train.max_steps=101") == 100
    assert warmup(*recipe, "--train.max_tokens", "1_000") == "auto"
    # What is typed is checked, not changed.
    assert warmup(*recipe, "--train.max_steps", "5", "--train.lr_warmup_steps", "100") == 100


def test_a_path_that_is_not_there_is_a_path():
    assert config_of(["pretrain", "x", "--data", "data/none"]).data == data.LitData(
        data_path="data/none"
    )
    with pytest.raises(UserError, match="--data TextFile is not known"):
        config_of(["pretrain", "x", "--data", "TextFile"])

"""The entries of the data commands: what they take, what they list, and how fast they answer."""

import subprocess
import sys

import pytest

from gristmill.cli import COMMANDS, main
from gristmill.config.data_commands import DataEstimate, DataImport, DataStats, DataVerify, listed
from gristmill.config.parse import parse

DATA = ["data stats", "data inspect", "data verify", "data estimate", "data import"]


def parsed(config, name, *words):
    positionals = COMMANDS[name].positionals
    return parse(config, words, prog=f"gristmill {name}", positionals=positionals)


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["data", "list"]])
def test_the_bare_group_lists_its_commands(words, capsys):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:2]) for line in lines] == DATA


def test_a_wrong_word_of_the_group_is_answered_with_the_near_one(capsys):
    assert main(["data", "stat"]) == 2
    assert "Did you mean data stats?" in capsys.readouterr().err
    assert main(["data", "xyz"]) == 2
    assert "Choose data stats, data inspect" in capsys.readouterr().err


def test_several_paths_follow_the_command():
    cfg = parsed(DataStats, "data stats", "a", "b", "--max_tokens", "5", "c")
    assert (listed(cfg.data_path), cfg.max_tokens) == (["a", "b", "c"], 5)
    assert listed(parsed(DataStats, "data stats", "a", "b").data_path) == ["a", "b"]
    assert listed(parsed(DataVerify, "data verify", "--data_path", "a").data_path) == ["a"]
    assert listed(parsed(DataImport, "data import", "x", "y", "--copy").input_dir) == ["x", "y"]
    assert listed(parsed(DataStats, "data stats").data_path) == []


def test_estimate_takes_the_words_of_prepare():
    words = ["jsonl", "--source_path", "in", "--tokenizer_path", "tok", "--match", "*.jsonl"]
    cfg = parsed(DataEstimate, "data estimate", *words)
    assert (cfg.layout, cfg.input_dir, cfg.tokenizer_dir) == ("jsonl", "in", "tok")
    assert cfg.pattern == "*.jsonl"


def test_download_and_prepare_status_are_there(capsys):
    assert main(["download"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3
    assert COMMANDS["prepare"].positionals == ("layout", "output_dir")


@pytest.mark.parametrize("name", [*DATA, "download"])
def test_help_imports_nothing_heavy(name):
    code = (
        "import sys; from gristmill.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'ray', 'rich', 'fsspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    words = [sys.executable, "-c", code, *name.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: gristmill " + name in done.stdout

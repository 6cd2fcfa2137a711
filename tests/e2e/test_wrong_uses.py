"""What a person gets wrong, through the command line: one message, its values, a way out."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from gristmill.cli import main

MISTAKE, FAILURE = 2, 1

# A model of a few thousand weights, so that a run takes a second where one is needed.
TINY = shlex.split(
    "--model_config.vocab_size 320 --model_config.max_seq_length 64 --model_config.num_layers 1"
    " --model_config.hidden_size 32 --model_config.num_heads 2 --model_config.intermediate_size 64"
)
QUICK = ["--compile", "off", "--eval.max_iters", "1", "--precision", "32-true"]


@pytest.fixture(scope="module")
def novel(tmp_path_factory) -> Path:
    """A folder of text: six files of a few thousand characters."""
    folder = tmp_path_factory.mktemp("text") / "novel"
    folder.mkdir()
    for n in range(6):
        lines = [f"Chapter {n}, line {i}: the mill ground on, {i * n} sacks.\n" for i in range(80)]
        (folder / f"{n}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(novel, tmp_path_factory) -> Path:
    """A tokenizer of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tok"
    assert (
        main(["tokenizer", "train", str(novel), "--out_dir", str(path), "--vocab_size", "300"]) == 0
    )
    return path


@pytest.fixture
def pretrain(novel, tokenizer, tmp_path, monkeypatch):
    """Arguments of a run that would work; a test adds its mistake."""
    monkeypatch.chdir(tmp_path)
    data = ["--data", "TextFiles", "--data.train_data_path", str(novel)]
    return ["pretrain", *TINY, *QUICK, *data, "--tokenizer_dir", str(tokenizer)]


@pytest.fixture
def refused(capfd):
    """Run a command that must fail; returns its message after checking its form."""

    def run(argv, *says: str, code: int = MISTAKE) -> str:
        capfd.readouterr()
        assert main([str(word) for word in argv]) == code
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert "failure inside gristmill" not in error, error
        assert len(re.findall(r"^error: ", error, re.MULTILINE)) == 1, error
        message = error[error.index("error: ") :]
        for text in says:
            assert text in message, f"{text!r} is not in: {message}"
        return message

    return run


def corrected(message: str) -> list[str]:
    """Arguments of the command that the message offers."""
    offer = re.search(r"^Try:\n  gristmill (.+)$", message, re.MULTILINE)
    assert offer, f"no corrected command in: {message}"
    return shlex.split(offer[1])


# The command and its words


def test_unknown_command(refused):
    refused(["pretran"], "'pretran'", "Did you mean pretrain")


def test_unknown_model_shows_the_nearest(refused, novel, tokenizer):
    data = ["--data", "TextFiles", "--data.train_data_path", novel, "--tokenizer_dir", tokenizer]
    refused(["pretrain", "pythia-14b", *data], "'pythia-14b'", "pythia-14m", "pretrain list")


def test_a_named_model_is_not_changed_by_options(refused, pretrain):
    argv = [pretrain[0], "pythia-14m", *pretrain[1:]]
    message = refused(
        argv, "does not change pythia-14m", "Leave out pythia-14m, or --model_config."
    )
    assert "Try:" not in message  # which of the two was meant is not known


def test_no_model(refused, pretrain):
    argv = [pretrain[0], *pretrain[1 + len(TINY) :]]
    refused(argv, "no model", "gristmill pretrain list")


def test_unknown_option(refused, pretrain):
    refused([*pretrain, "--train.max_token", "5"], "--train.max_token", "--train.max_tokens")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--parallel.pipeline", "2"), "There is no pipeline parallel yet"),
        (("--precision", "float8"), "bf16-mixed"),
    ],
)
def test_what_is_not_there_yet_is_refused_in_words(refused, pretrain, words, says):
    refused([*pretrain, *words], words[0], says)


def test_unknown_option_of_the_data(refused, pretrain):
    refused([*pretrain, "--data.patern", "*.txt"], "--data.patern", "--data.pattern")


@pytest.mark.parametrize(
    ("option", "value", "takes"),
    [
        ("--train.max_tokens", "many", "a whole number"),
        ("--optimizer.lr", "fast", "a number"),
        ("--precision", "fp4", "bf16-mixed"),
        ("--overwrite", "perhaps", "true or false"),
    ],
)
def test_value_of_another_kind(refused, pretrain, option, value, takes):
    refused([*pretrain, option, value], option, value, takes)


def test_unknown_data_module(refused):
    refused(["pretrain", "pythia-14m", "--data", "TextFile"], "TextFile", "TextFiles", "Jsonl")


def test_data_option_without_a_module(refused, novel):
    argv = ["pretrain", "pythia-14m", "--data.train_data_path", novel]
    refused(argv, "--data.train_data_path", "--data with one of", "TextFiles")


def test_data_module_lacks_its_path(refused):
    refused(["pretrain", "pythia-14m", "--data", "TextFiles"], "--data.train_data_path")


def test_unknown_recipe(refused):
    refused(["pretrain", "--config", "pretrain/debugg"], "'pretrain/debugg'", "pretrain/debug")


def test_bad_yaml(refused, tmp_path):
    bad = tmp_path / "run.yaml"
    bad.write_text("train:\n  max_tokens: 5\n max_steps: [1\n")
    refused(["pretrain", "--config", bad], str(bad), "line 3", "Correct that line")


def test_unknown_key_in_yaml(refused, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  max_token: 5\n")
    refused(["pretrain", "pythia-14m", "--config", file], "max_token", "max_tokens")


# Tokenizer and text


def test_no_tokenizer(refused, pretrain):
    refused(pretrain[:-2], "--tokenizer_dir", "gristmill tokenizer train")


def test_missing_tokenizer(refused, pretrain, tmp_path):
    refused([*pretrain[:-1], tmp_path / "nowhere"], str(tmp_path / "nowhere"), "tokenizer")


def test_tokenizer_directory_without_one(refused, pretrain, tmp_path):
    refused([*pretrain[:-1], tmp_path], str(tmp_path), "tokenizer.json")


def test_vocabulary_larger_than_the_model(refused, pretrain):
    message = refused([*pretrain, "--model_config.vocab_size", "290"], "290", "299", "300")
    assert "--vocab_size 290" in message


def prepare(novel, tokenizer, out, *more):
    return [
        *("prepare", "textfiles", "--input_dir", novel, "--tokenizer_dir", tokenizer),
        *("--output_dir", out, *more),
    ]


def test_missing_folder(refused, tokenizer, tmp_path):
    refused(prepare(tmp_path / "gone", tokenizer, tmp_path / "out"), str(tmp_path / "gone"))


def test_empty_folder(refused, tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        prepare(tmp_path / "empty", tokenizer, tmp_path / "out"),
        str(tmp_path / "empty"),
        "there are no files",
    )
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_folder_of_other_files(refused, tokenizer, tmp_path):
    (tmp_path / "page.html").write_text("<p>text</p>")
    refused(prepare(tmp_path, tokenizer, tmp_path / "out"), "'**/*.txt'", "**/*.html")


def test_unreadable_file(refused, novel, tokenizer, tmp_path):
    """A link to nowhere: unreadable for everybody, root too."""
    folder = shutil.copytree(novel, tmp_path / "novel")
    (folder / "lost.txt").symlink_to(tmp_path / "nowhere")
    refused(prepare(folder, tokenizer, tmp_path / "out"), "lost.txt")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(refused, novel, tokenizer, tmp_path):
    folder = shutil.copytree(novel, tmp_path / "novel")
    (folder / "0.txt").chmod(0)
    refused(prepare(folder, tokenizer, tmp_path / "out"), "0.txt")


def test_binary_file(refused, novel, tokenizer, tmp_path):
    folder = shutil.copytree(novel, tmp_path / "novel")
    (folder / "image.txt").write_bytes(bytes(range(256)) * 64)
    argv = prepare(folder, tokenizer, tmp_path / "out", "--num_workers", "1")
    refused(argv, "image.txt", "binary: 1", "--max_reject_fraction")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_broken_json_lines(refused, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n{"other": "three"}\n')
    argv = ["prepare", "jsonl", "--input_dir", tmp_path / "a.jsonl", "--num_workers", "1"]
    argv += ["--tokenizer_dir", tokenizer, "--output_dir", tmp_path / "out"]
    refused(argv, "a.jsonl", "2 of 3", "bad JSON: 1", "no field 'text': 1")


def test_another_dataset_is_not_overwritten(refused, novel, tokenizer, tmp_path):
    argv = prepare(novel, tokenizer, tmp_path / "out", "--num_workers", "1")
    assert main([str(word) for word in argv]) == 0
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    refused([*argv, "--eos", "7"], str(tmp_path / "out"), "--overwrite")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == manifest


def test_options_that_a_layout_has_no_use_for(refused, novel, tokenizer, tmp_path):
    argv = prepare(novel, tokenizer, tmp_path / "out")
    refused([*argv, "--text_field", "body"], "--text_field body", "textfiles")
    assert not (tmp_path / "out").exists()


# The length of the run


def test_tokens_below_one_batch(refused, pretrain):
    argv = [*pretrain, "--train.max_tokens", "100", "--train.global_batch_size", "4"]
    argv += ["--train.max_seq_length", "32"]
    message = refused(argv, "max_tokens=100", "4 samples x 32 tokens", "128")
    assert main(corrected(message)) == 0


def test_warm_up_longer_than_the_run(refused, pretrain):
    argv = [*pretrain, "--train.max_steps", "3", "--train.lr_warmup_steps=20"]
    message = refused(argv, "lr_warmup_steps=20", "3 steps")
    assert main(corrected(message)) == 0


def test_sequence_longer_than_the_model(refused, pretrain):
    message = refused([*pretrain, "--train.max_seq_length", "65"], "max_seq_length=65", "64")
    assert "--train.max_seq_length 64" in shlex.join(corrected(message))


def test_sequence_longer_than_the_documents_allow(refused, pretrain, tmp_path):
    (tmp_path / "short.txt").write_text("Two words, then some. " * 4)
    argv = [*pretrain, "--data.train_data_path", tmp_path / "short.txt"]
    argv += ["--data.val_fraction", "0", "--model_config.max_seq_length", "4096"]
    message = refused([*argv, "--train.max_seq_length", "4096"], "max_seq_length=4096", "longest")
    assert int(corrected(message)[-1]) < 4096


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train.max_steps", "0"),
        ("--train.max_tokens", "-5"),
        ("--train.global_batch_size", "0"),
        ("--train.max_time", "soon"),
        ("--train.min_lr", "1"),
        ("--train.keep_last", "1"),
        ("--optimizer.lr", "0"),
        ("--devices", "0"),
    ],
)
def test_value_out_of_range(refused, pretrain, option, value):
    refused([*pretrain, option, value], option.rpartition(".")[2].lstrip("-"), value)


# The run directory and the disk


def test_directory_of_another_run(refused, pretrain, tmp_path):
    argv = [*pretrain, "--train.max_steps", "2", "--out_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    message = refused(
        [*argv, "--seed", "7"], str(tmp_path / "run"), "seed: 42 -> 7", "--overwrite true"
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    other = corrected(message)
    assert other[-2:] == ["--out_dir", str(tmp_path / "run-2")]
    assert main(other) == 0


def test_out_dir_is_a_file(refused, pretrain, tmp_path):
    (tmp_path / "run").write_text("")
    refused([*pretrain, "--out_dir", tmp_path / "run"], str(tmp_path / "run"), "is a file")


def test_no_space_for_the_run(refused, pretrain, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    message = refused([*pretrain, "--out_dir", tmp_path / "run"], "space", code=FAILURE)
    assert str(tmp_path) in message


def test_disk_fills_while_preparing(refused, novel, tokenizer, tmp_path, monkeypatch):
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = prepare(novel, tokenizer, tmp_path / "out", "--num_workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(argv, "no space left", str(tmp_path / "out"), code=FAILURE)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main([str(word) for word in argv]) == 0  # goes on once there is space


# Using a model


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_no_such_model_directory(refused, command, tmp_path):
    refused([command, tmp_path / "nowhere"], str(tmp_path / "nowhere"))


def test_directory_without_a_model(refused, tmp_path):
    refused(["generate", tmp_path], str(tmp_path), "config.json")


def test_installed_command_leaves_with_the_code(tmp_path):
    """The same through the real entry point: exit code, streams, no traceback."""
    command = [sys.executable, "-m", "gristmill", "pretrain", "pythia-14b", "--data", "TextFiles"]
    done = subprocess.run(
        [*command, "--data.train_data_path", str(tmp_path), "--tokenizer_dir", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == MISTAKE
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "pythia-14m" in done.stderr

"""A trained model of each kind of directory writes text through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small

from gristmill.cli import main

GOLDEN_TOKENS = 80


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run of the small world."""
    folder = tmp_path_factory.mktemp("world")
    text = small.write_novels(folder / "novels")
    small.train_tokenizer(text, folder / "tokenizer")
    longer = ("--train.max_steps", "60", "--train.save_interval", "20", "--optimizer.lr", "0.01")
    assert main(small.pretrain(folder, folder / "run", *longer)) == 0
    return folder / "run"


def generate(capsys, path, *options):
    capsys.readouterr()
    code = main(["generate", str(path), "--precision", "32-true", "--device", "cpu", *options])
    assert code == 0
    return capsys.readouterr().out


def command(*words, **options):
    """A `gristmill` process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gristmill", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_run_final_and_checkpoint_write_the_same(run_dir, capsys):
    options = ("--prompt", "the mill", "--temperature", "0", "--max_new_tokens", "20")
    text = generate(capsys, run_dir, *options)
    assert set(text.split()) & set(small.WORDS), f"no word of the training text in {text!r}"
    newest = max(run_dir.glob("step-*"))
    for path in (run_dir / "final", newest):
        assert generate(capsys, path, *options) == text
    older = min(run_dir.glob("step-*"))
    assert older != newest
    generate(capsys, older, *options)


def test_option_form_and_seed(run_dir, capsys):
    written = []
    for seed in ("1", "1", "2"):
        code = main(["generate", f"--checkpoint_dir={run_dir}", "--prompt=the", f"--seed={seed}"])
        assert code == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]


def test_greedy_is_the_golden_text(shared, capsys):
    model = shared / "data/models/stories260K"
    golden = (model / "golden_greedy_80.txt").read_text()
    options = ("--temperature", "0", "--max_new_tokens", str(GOLDEN_TOKENS))
    text = generate(capsys, model / "hf", "--prompt", "", *options)
    assert text.rstrip("\n") == golden.rstrip("\n")
    # The same behind the first words as the prompt, which is not repeated on stdout.
    rest = generate(capsys, model / "hf", "--prompt", "Once upon a time", *options)
    assert ("Once upon a time" + rest).startswith(golden.rstrip("\n"))


def test_chat_through_a_pipe(run_dir):
    words = ("chat", run_dir, "--max_new_tokens", "5", "--device", "cpu")
    process = command(*words, stdin=subprocess.PIPE)
    out, err = process.communicate(b"the mill\nold Anna\n\n", timeout=120)
    assert process.returncode == 0, err.decode()
    text = out.decode()
    assert text.startswith("Now chatting with run.\nTo exit, press 'Enter' on an empty prompt.\n")
    assert text.count(">> Reply: ") == 2
    assert err.decode().count("Time for inference: ") == 2


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_no_model_there(name, tmp_path, capsys):
    assert main([name, str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "nowhere does not exist" in err
    assert main([name]) == 2
    assert "no model given" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_with_130(run_dir):
    samples = ("--num_samples", "100000", "--device", "cpu")
    process = command("generate", run_dir, *samples)
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len((first + out).decode()) >= 20
    assert "Traceback" not in err.decode()
    assert "Time for inference" in err.decode()


def test_a_reader_that_leaves_is_no_failure(run_dir):
    process = command("generate", run_dir, "--num_samples", "200", "--device", "cpu")
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 0, err
    assert "Traceback" not in err


def test_a_prompt_through_a_pipe_and_prompts_from_a_file(run_dir, tmp_path, capsys):
    options = ("--precision", "32-true", "--device", "cpu", "--max_new_tokens", "8")
    process = command("generate", run_dir, *options, stdin=subprocess.PIPE)
    piped, err = process.communicate(b"old Anna\n", timeout=120)
    assert process.returncode == 0, err.decode()
    (tmp_path / "prompts.txt").write_text("the mill\nold Anna\n")
    listed = ("--prompt_file", str(tmp_path / "prompts.txt"), "--max_new_tokens", "8")
    assert piped.decode() == generate(capsys, run_dir, *listed).splitlines(True)[1]
    assert generate(capsys, run_dir, "old Anna", *options).encode() == piped


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_results_go_on(run_dir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("".join(f"the mill {n}\n" for n in range(300)))
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    words = (*("--prompt_file", str(tmp_path / "prompts.txt")), "--output", str(out))
    process = command("generate", run_dir, *words, "--precision", "32-true", "--device", "cpu")
    while process.poll() is None and (not partial.exists() or len(partial.read_bytes()) < 2000):
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(partial.read_bytes().splitlines()) - 1
    assert 0 < kept < 300
    assert not out.exists()
    assert generate(capsys, run_dir, *words) == ""
    texts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [text["prompt"] for text in texts] == [f"the mill {n}" for n in range(300)]
    assert not partial.exists()
    alone = generate(capsys, run_dir, "the mill 7")
    assert texts[7]["completion"] + "\n" == alone

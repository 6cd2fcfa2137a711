"""Models are measured wherever they lie: runs, checkpoints, LitGPT's files, beside training."""

import json
import signal
import subprocess
import sys

import pytest
import small

from gristmill.cli import main

pytest.importorskip("lm_eval")

PAIRS = """task: my_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of 300 pairs: the words of the training text, and them backwards."""
    folder = tmp_path_factory.mktemp("tasks")
    words = small.WORDS
    rows = []
    for start in range(300):
        part = [words[(start * 7 + n) % len(words)] for n in range(5)]
        rows.append({"good": " ".join(part), "bad": " ".join(part)[::-1]})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_pairs.yaml").write_text(PAIRS.format(file=folder / "pairs.jsonl"))
    return folder


def accuracy(file):
    return json.loads(file.read_text())["results"]["my_pairs"]["acc,none"]


def test_every_kind_of_directory_is_measured_alike(own_run, tasks, tmp_path):
    assert main(["export", str(own_run), str(tmp_path / "lit"), "--format", "litgpt"]) == 0
    options = ["--tasks", "my_pairs", "--include_path", str(tasks), "--batch_size", "4"]
    out = tmp_path / "hf"
    assert main(["evaluate", str(tmp_path / "lit"), *options, "--out_dir", str(out)]) == 0
    found = [accuracy(out / "results.json")]
    for path in (own_run, max(own_run.glob("step-*")), out):
        file = tmp_path / "results.json"
        assert main(["evaluate", str(path), *options, "--save_filepath", str(file)]) == 0
        found.append(accuracy(file))
    assert found[0] > 0.6, "what it was trained on is likelier than its letters backwards"
    assert len(set(found)) == 1


@pytest.mark.slow
def test_beside_training(world, tasks, tmp_path):
    command = f"{sys.executable} -m gristmill evaluate {{model}} --tasks my_pairs --device cpu"
    more = ("--eval.command", f"{command} --include_path {tasks}", "--eval.command_interval", "8")
    out = tmp_path / "run"
    assert main(small.pretrain(world, out, *more)) == 0
    assert accuracy(out / "evaluate/step-00000020/results.json") > 0.5
    log = (out / "eval/step-00000020.log").read_text()
    assert log.splitlines()[-1].startswith("my_pairs acc ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_nothing_half_written(own_run, tasks, tmp_path):
    rows = (tasks / "pairs.jsonl").read_text().splitlines()
    many = tmp_path / "tasks"
    many.mkdir()
    (many / "pairs.jsonl").write_text(
        "\n".join(f'{row[:-1]}, "n": {n}}}' for n, row in enumerate(rows * 10))
    )
    task = PAIRS.format(file=many / "pairs.jsonl")
    (many / "my_pairs.yaml").write_text(task.replace("good, bad", "good ~ n, bad ~ n"))
    words = ["evaluate", str(own_run), "--tasks", "my_pairs", "--include_path", str(many)]
    file = tmp_path / "results.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "gristmill", *words, "--save_filepath", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (line := process.stderr.readline()).startswith("Model:"):
        assert line, "it ended before the model was there"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not out
    assert not file.exists()

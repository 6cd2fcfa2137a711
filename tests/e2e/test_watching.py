"""What looks at a run from beside shows something and changes nothing."""

from __future__ import annotations

import json
import sys
import time

import pytest
from small import final_weights, main, metrics, pretrain

QUIET = ("--eval.initial_validation", "false", "--train.max_steps", "10")
PROMPTS = '["The mill", "Anna counted"]'


def samples(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_samples_and_a_profile_change_nothing(world, tmp_path, capsys, precision):
    same = (*QUIET, "--precision", precision)
    assert main(pretrain(world, tmp_path / "plain", *same)) == 0
    capsys.readouterr()
    looked_at = ("--eval.sample_prompt", PROMPTS, "--eval.sample_interval", "4")
    looked_at += ("--eval.sample_tokens", "12", "--profile", "3:5")
    assert main(pretrain(world, tmp_path / "seen", *same, *looked_at)) == 0
    assert final_weights(tmp_path / "seen") == final_weights(tmp_path / "plain")
    for name in ("loss", "grad_norm", "val_loss"):
        assert [row.get(name) for row in metrics(tmp_path / "seen")] == [
            row.get(name) for row in metrics(tmp_path / "plain")
        ]
    written = samples(tmp_path / "seen")
    names = ["sample/1", "sample/2"]
    assert [(row["step"], row["name"]) for row in written] == [
        (step, name) for step in (4, 8, 10) for name in names
    ]
    assert all(row["text"].startswith(("The mill|", "Anna counted|")) for row in written)
    shown = capsys.readouterr().out
    assert "step 8  The mill|" in shown
    assert "profile of 3 steps" in shown
    for part in ("data", "forward", "backward", "loss", "optimizer", "validation", "save"):
        assert f"\n  {part} " in shown, part
    assert (tmp_path / "seen/profile/steps-3-5.json.gz").is_file()
    assert not (tmp_path / "plain/samples.jsonl").exists()
    assert not (tmp_path / "plain/profile").exists()


def test_samples_of_a_compiled_model(world, tmp_path):
    compiled = ("--compile", "auto", "--train.max_steps", "4")
    assert main(pretrain(world, tmp_path / "plain", *QUIET, *compiled)) == 0
    prompt = ("--eval.sample_prompt", "The mill", "--eval.sample_interval", "2")
    assert main(pretrain(world, tmp_path / "seen", *QUIET, *compiled, *prompt)) == 0
    assert final_weights(tmp_path / "seen") == final_weights(tmp_path / "plain")
    assert [row["step"] for row in samples(tmp_path / "seen")] == [2, 4]


def test_a_command_sees_the_weights_of_new_checkpoints(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "sesame-0123456789")
    script = tmp_path / "look.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "model = pathlib.Path(sys.argv[1])\n"
        "print(sorted(p.name for p in model.iterdir()))\n"
        "assert 'RANK' not in os.environ\n"
        "(pathlib.Path(sys.argv[2]) / f'seen-{sys.argv[3]}').write_text('')\n"
        "print(os.environ['SOME_TOKEN'], 'score', len(list(model.iterdir())))\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setenv("RANK", "0")
    out = tmp_path / "run"
    command = f"{sys.executable} {script} {{model}} {tmp_path} {{step}}"
    words = pretrain(world, out, *QUIET, "--eval.command", command)
    assert main(words) == 0
    assert (tmp_path / "seen-10").exists(), "the last checkpoint is looked at"
    log = (out / "eval/step-00000010.log").read_text()
    assert "model.safetensors" in log
    assert "tokenizer.json" in log
    shown = capsys.readouterr().out
    assert "step 10: --eval.command ended with 3: *** score" in shown
    assert not (out / "eval/weights").exists()
    assert (out / "final/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--eval.sample_interval", "4"), "--eval.sample_prompt"),
        (("--eval.sample_tokens", "4"), "--eval.sample_prompt"),
        (("--eval.command_interval", "4"), "--eval.command"),
        (("--eval.command", "evaluate it"), "{model}"),
        (("--eval.sample_prompt", "x", "--eval.sample_interval", "0"), "out of range"),
        (("--train.spike_window", "10"), "--train.on_spike skip"),
        (("--train.spike_deviations", "3"), "--train.on_spike skip"),
        (("--profile", "soon"), "--profile 20:25"),
        (("--logger_name", "neptune"), "neptune is not known"),
    ],
)
def test_settings_that_mean_nothing_are_refused(world, tmp_path, capsys, options, said):
    assert main(pretrain(world, tmp_path / "run", *options)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_ends_its_command(world, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(
        "import time\n"
        "def fail(run, stats):\n"
        "    time.sleep(0.2)\n"
        "    if run.state.step == 8:\n"
        "        raise RuntimeError('enough')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    command = f"touch {tmp_path}/begun; sleep 100; touch {tmp_path}/ended # {{model}}"
    more = ("--eval.command", command, "--hook", "failing:fail")
    began = time.monotonic()
    assert main(pretrain(world, tmp_path / "run", *QUIET, *more)) == 1
    assert time.monotonic() - began < 60
    assert not (tmp_path / "ended").exists()
    assert not (tmp_path / "run/eval/weights").exists()

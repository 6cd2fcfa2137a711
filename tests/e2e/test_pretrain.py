"""A run through the command line: what it writes, how it ends, and that nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from small import final_weights, main, metrics, pretrain

from gristmill.checkpoint.store import complete
from gristmill.formats.model_dir import load_model

CPU = torch.device("cpu")
INTERRUPTIONS = {
    "crash": "    if run.state.step == 10: raise OSError('pulled the plug')\n",
    "sigterm": "    if run.state.step == 10: os.kill(os.getpid(), signal.SIGTERM)\n",
    "sigint": "    if run.state.step == 10: os.kill(os.getpid(), signal.SIGINT)\n",
}


def hook(tmp_path, monkeypatch, name, body):
    """An importable hook module; returns the option that names it."""
    source = f"import os, signal, torch\ndef hook(run, stats):\n{body}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return ("--hook", f"{name}:hook")


def test_a_run_learns_and_every_step_stands_once(world):
    rows = metrics(world / "run")
    assert [row["step"] for row in rows] == list(range(21))
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.3
    checks = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(checks) == [0, 5, 10, 15, 20]
    assert checks[20] < checks[0] - 0.3
    assert rows[-1]["tokens"] == 20 * 4 * 64
    assert rows[-1]["val_bits_per_byte"] < rows[0]["val_bits_per_byte"]


def test_the_directory_holds_three_checkpoints_and_the_model(world):
    assert [p.name for p in complete(world / "run")] == [
        "step-00000020",
        "step-00000016",
        "step-00000012",
    ]
    names = {p.name for p in (world / "run/final").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "hyperparameters.yaml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names


def test_final_loads_in_transformers_with_the_same_logits(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = world / "run/final"
    theirs = AutoModelForCausalLM.from_pretrained(final).eval()
    ids = AutoTokenizer.from_pretrained(final)("the mill turned", return_tensors="pt").input_ids
    ours = load_model(final, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(found, expected[..., : found.shape[-1]], rtol=1e-5, atol=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(own_run, world, capsys):
    def times():
        files = [p for p in own_run.rglob("*") if p.is_file() and p.name != ".lock"]
        return {p: p.stat().st_mtime_ns for p in files}

    before = times()
    assert main(pretrain(world, own_run)) == 0
    assert "is finished: 20 steps" in capsys.readouterr().out
    assert times() == before


def test_a_larger_limit_goes_on_from_the_last_step(own_run, world):
    assert main(pretrain(world, own_run, "--train.max_steps", "26")) == 0
    assert [row["step"] for row in metrics(own_run)] == list(range(27))
    assert complete(own_run)[0].name == "step-00000026"
    assert final_weights(own_run) != final_weights(world / "run")


@pytest.mark.parametrize("kind", INTERRUPTIONS)
def test_an_interrupted_run_ends_with_the_same_bits(kind, world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    option = hook(tmp_path, monkeypatch, f"interrupt_{kind}", INTERRUPTIONS[kind])
    code = main(pretrain(world, out, *option))
    assert code == {"crash": 1, "sigterm": 143, "sigint": 130}[kind]
    assert not (out / "final").exists()
    saved = complete(out)[0].name
    # A crash loses the steps since the last checkpoint, a signal none.
    assert saved == ("step-00000008" if kind == "crash" else "step-00000010")
    if kind != "crash":
        assert "Run the same command again" in capsys.readouterr().err
    assert main(pretrain(world, out)) == 0
    assert f"weights   from {out / saved}" in capsys.readouterr().out
    assert final_weights(out) == final_weights(world / "run")
    assert [row["step"] for row in metrics(out)] == list(range(21))
    same = ("step", "loss", "grad_norm", "lr", "val_loss")
    for mine, reference in zip(metrics(out), metrics(world / "run"), strict=True):
        assert {k: mine.get(k) for k in same} == {k: reference.get(k) for k in same}


def test_signals_do_what_they_did_before_once_a_run_is_over(world, own_run):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert main(pretrain(world, own_run, "--train.max_steps", "21")) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_damaged_newest_checkpoint_falls_back_with_a_line(own_run, world, capsys):
    shutil.rmtree(own_run / "final")
    weights = next((own_run / "step-00000020/weights").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(pretrain(world, own_run)) == 0
    assert "step-00000020 is not used" in capsys.readouterr().err
    assert final_weights(own_run) == final_weights(world / "run")
    assert [row["step"] for row in metrics(own_run)] == list(range(21))


def test_a_partial_checkpoint_is_not_taken_for_one(own_run, world):
    shutil.rmtree(own_run / "final")
    (own_run / "step-00000020/checkpoint.json").unlink()
    assert main(pretrain(world, own_run)) == 0
    assert final_weights(own_run) == final_weights(world / "run")


def test_a_failed_save_keeps_training_and_turns_the_exit_code(world, tmp_path, monkeypatch, capsys):
    import gristmill.checkpoint.save as save

    real, calls = save.write_tensors, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(save, "write_tensors", full)
    assert main(pretrain(world, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "step-00000008 was not saved: No space left on device" in error
    assert final_weights(tmp_path / "run") == final_weights(world / "run")


def test_steps_that_are_not_finite_stop_the_run_and_name_the_way_back(
    world, tmp_path, monkeypatch, capsys
):
    body = "    if run.state.step == 9: run.model.norm.weight.data.fill_(float('nan'))\n"
    option = hook(tmp_path, monkeypatch, "poison", body)
    words = pretrain(world, tmp_path / "run", *option, "--train.max_bad_steps", "3")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "not finite in 3 steps in a row (up to step 12)" in error
    assert "--initial_checkpoint_dir" in error


def test_a_fork_takes_weights_optimizer_and_place(world, tmp_path):
    source = world / "run/step-00000016"
    assert main(pretrain(world, tmp_path / "fork", "--resume", str(source))) == 0
    assert final_weights(tmp_path / "fork") == final_weights(world / "run")
    assert [row["step"] for row in metrics(tmp_path / "fork")] == [17, 18, 19, 20]


def test_a_fork_with_nothing_left_to_train_is_refused(world, tmp_path, capsys):
    source = str(world / "run/step-00000016")
    words = pretrain(world, tmp_path / "fork", "--resume", source, "--train.max_steps", "10")
    assert main(words) == 2
    assert "nothing is left to train" in capsys.readouterr().err
    assert not (tmp_path / "fork/final").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train.keep_every", "0"),
        ("--train.max_norm", "0"),
        ("--train.log_interval", "0"),
        ("--eval.max_iters", "0"),
        ("--optimizer.betas", "[2,3]"),
        ("--model_config.num_layers", "0"),
    ],
)
def test_a_mistake_with_overwrite_deletes_nothing(option, value, own_run, world, capsys):
    before = sorted(own_run.rglob("*"))
    assert main(pretrain(world, own_run, "--overwrite", option, value)) == 2
    assert sorted(own_run.rglob("*")) == before
    assert "failure inside" not in capsys.readouterr().err


def test_a_hook_that_fails_is_named(world, tmp_path, monkeypatch, capsys):
    option = hook(tmp_path, monkeypatch, "broken", "    {}['key']\n")
    assert main(pretrain(world, tmp_path / "run", *option)) == 1
    assert "--hook broken:hook failed at step 1 (KeyError" in capsys.readouterr().err


def test_going_on_from_an_older_checkpoint_in_place_is_refused(own_run, world, capsys):
    words = pretrain(world, own_run, "--resume", str(own_run / "step-00000016"))
    assert main(words) == 2
    assert "not the newest checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["final", "step-00000020", "."])
def test_a_new_run_starts_from_given_weights(source, world, tmp_path):
    initial = str(world / "run" / source)
    words = pretrain(world, tmp_path / "run", "--initial_checkpoint_dir", initial)
    assert main([*words, "--train.max_steps", "2"]) == 0
    rows = metrics(tmp_path / "run")
    assert rows[0]["val_loss"] == pytest.approx(metrics(world / "run")[-1]["val_loss"], abs=0.05)
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_another_process_in_the_directory_is_refused(own_run, world, capsys):
    from gristmill.train.directory import lock

    with lock(own_run):
        assert main(pretrain(world, own_run, "--train.max_steps", "25")) == 2
    error = capsys.readouterr().err
    assert f"pid {os.getpid()}" in error
    assert "--out_dir" in error


def test_time_limit_ends_a_run_with_a_model(world, tmp_path, capsys):
    words = pretrain(world, tmp_path / "run", "--train.max_time", "0.001s")
    assert main(words) == 0
    assert (tmp_path / "run/final/config.json").is_file()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1]
    assert "--train.max_time is over at step 1" in capsys.readouterr().out
    assert main(words) == 0
    assert "A larger --train.max_time goes on" in capsys.readouterr().out


def test_validation_does_not_change_training(world, tmp_path):
    words = pretrain(world, tmp_path / "run", "--eval.interval", "1000")
    assert main([*words, "--eval.initial_validation", "false"]) == 0
    assert final_weights(tmp_path / "run") == final_weights(world / "run")


def test_overwrite_starts_again(own_run, world):
    assert main(pretrain(world, own_run, "--overwrite", "true", "--seed", "7")) == 0
    assert final_weights(own_run) != final_weights(world / "run")
    assert [row["step"] for row in metrics(own_run)] == list(range(21))


def test_deterministic_algorithms_are_used_in_the_run_only(world, tmp_path, monkeypatch):
    body = "    assert torch.are_deterministic_algorithms_enabled()\n"
    option = hook(tmp_path, monkeypatch, "deterministic_check", body)
    words = pretrain(world, tmp_path / "run", *option, "--train.max_steps", "2")
    assert main(words) == 1
    assert main([*words, "--deterministic", "true"]) == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_options_of_a_tracker_that_is_not_used_are_refused(world, tmp_path, capsys):
    assert main(pretrain(world, tmp_path / "run", "--log.project", "mills")) == 2
    assert "--log.project is given, and no chosen tracker takes it" in capsys.readouterr().err


def test_trackers_write_beside_the_metrics_and_no_key_is_kept(world, tmp_path, monkeypatch, capfd):
    names = ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.setenv(name, f"sesame-of-{name}")
    run = tmp_path / "run"
    # A shell puts the value where `$HF_TOKEN` is typed.
    typed = f"echo {{model}} sesame-of-{names[1]}; echo https://me:sesame-open@example.org"
    more = ("--logger_name", "csv,tensorboard", "--eval.command", typed)
    assert main(pretrain(world, run, *more, "--train.max_steps", "5")) == 0
    assert "***" in (run / "eval/step-00000005.log").read_text()
    assert (run / "metrics.csv").is_file()
    assert list((run / "tensorboard").iterdir())
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"run.yaml", "hyperparameters.yaml", "checkpoint.json"} <= {p.name for p in files}
    assert not [path for path in files if b"sesame" in path.read_bytes()]
    shown = capfd.readouterr()
    assert "sesame" not in shown.out + shown.err


def test_model_and_optimizer_of_ones_own(world, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "import torch\n"
        "from gristmill.config.model import ModelConfig\n"
        "from gristmill.config.sections import Optimizer\n"
        "TINY = ModelConfig(name='mine', vocab_size=320, num_layers=1, hidden_size=16,\n"
        "                   num_heads=2, intermediate_size=32, max_seq_length=64)\n"
        "class Sgd(Optimizer):\n"
        "    def __init__(self, lr: float = 0.1, momentum: float = 0.9):\n"
        "        self.lr, self.momentum = lr, momentum\n"
        "    def build(self, model):\n"
        "        return torch.optim.SGD(model.parameters(), self.lr, self.momentum)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = [w for w in pretrain(world, tmp_path / "run") if not w.startswith("--model_config")]
    words = [own[0], "my_parts:TINY", *own[1:], "--optimizer", "my_parts:Sgd"]
    words += ["--optimizer.lr", "0.5"]
    assert main(words) == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(21))
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1
    assert '"hidden_size": 16' in (tmp_path / "run/final/config.json").read_text()


def test_python_takes_plain_values(world, tmp_path):
    import gristmill

    prepared = next((world / "novels/.gristmill").glob("*/train")).parent
    gristmill.pretrain(
        model_config={"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 300},
        data=prepared,
        out_dir=tmp_path / "run",
        compile="off",
        train={"max_steps": 2, "max_seq_length": 32, "global_batch_size": 2},
    )
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(world, tmp_path):
    words = [w if w != "off" else "auto" for w in pretrain(world, tmp_path / "run")]
    assert main(words) == 0
    compiled, eager = metrics(tmp_path / "run"), metrics(world / "run")
    assert compiled[-1]["val_loss"] == pytest.approx(eager[-1]["val_loss"], rel=1e-3)


def test_a_fork_on_other_samples_names_what_changed(world, tmp_path, capsys):
    source = world / "run/step-00000016"
    more = ("--resume", str(source), "--data.seed", "7")
    assert main(pretrain(world, tmp_path / "fork", *more)) == 2
    error = capsys.readouterr().err
    assert "seed was 42, now 7: the shuffle is another" in error
    assert "--initial_checkpoint_dir" in error

"""The options of finetuning: recipes, LitGPT's own files and spellings, and mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gristmill import cli
from gristmill.config.finetune import FinetuneAdapter, FinetuneFull, FinetuneLora
from gristmill.config.parse import parse, to_yaml
from gristmill.config.recipes import names
from gristmill.config.tuning_data import JSON, LIMA, Alpaca2k
from gristmill.util.errors import UserError

COMMANDS = {"full": FinetuneFull, "lora": FinetuneLora, "adapter": FinetuneAdapter}
RECIPES = [name for name in names() if name.startswith("finetune/")]
HUB = "https://raw.githubusercontent.com/Lightning-AI/litgpt/main/"


def finetune(how, *words):
    return parse(
        COMMANDS[how], words, prog=f"gristmill finetune {how}", positionals=("checkpoint_dir",)
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses_and_round_trips(recipe, tmp_path):
    how = recipe.rpartition("/")[2]
    cfg = finetune(how, "--config", recipe)
    assert cfg.checkpoint_dir.startswith("checkpoints/")
    assert cfg.out_dir.startswith(f"out/finetune/{how}-")
    assert cfg.data
    (tmp_path / "c.yaml").write_text(to_yaml(cfg))
    assert finetune(how, "--config", str(tmp_path / "c.yaml")) == cfg


def test_the_older_paths_and_urls_of_a_recipe():
    cfg = finetune("lora", "--config", "finetune/phi-2/lora.yaml")
    for path in (
        "config_hub/finetune/phi-2/lora.yaml",
        f"{HUB}config_hub/finetune/phi-2/lora.yaml",
    ):
        assert finetune("lora", "--config", path) == cfg
    short = finetune(
        "lora", "--config", "config_hub/finetune/phi-2/lora.yaml", "--train.max_steps", "50"
    )
    assert short.train.max_steps == 50
    assert short.lora_mlp
    assert isinstance(short.data, Alpaca2k)


LITGPT = """
checkpoint_dir: checkpoints/org/name
out_dir: out/finetune/lora-name
precision: bf16-true
quantize:
devices: 1
num_nodes: 1
lora_r: 8
lora_alpha: 16
lora_head: true
data:
  class_path: litgpt.data.Alpaca2k
  init_args:
    mask_prompt: false
    val_split_fraction: 0.03847
    prompt_style: alpaca
    ignore_index: -100
    seed: 42
    num_workers: 4
train:
  save_interval: 800
  log_interval: 1
  global_batch_size: 8
  micro_batch_size: 4
  lr_warmup_steps: 10
  epochs: 1
  max_tokens:
  max_steps:
  max_seq_length: 512
  tie_embeddings:
  max_norm:
  min_lr:
eval:
  interval: 100
  max_new_tokens: 100
  max_iters: 100
  initial_validation: false
  final_validation: true
  evaluate_example: first
logger_name: csv
seed: 1337
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 0.0002
    weight_decay: 0.0
    betas: [0.9, 0.95]
"""


def test_a_file_of_litgpt_is_taken_as_it_is(tmp_path):
    (tmp_path / "c.yaml").write_text(LITGPT)
    cfg = finetune("lora", "--config", str(tmp_path / "c.yaml"))
    assert isinstance(cfg.data, Alpaca2k)
    assert (cfg.data.val_fraction, cfg.data.mask_prompt) == (0.03847, False)
    assert cfg.train.max_norm is None
    assert (cfg.train.max_tokens, cfg.train.min_lr, cfg.train.micro_batch_size) == (
        "auto",
        "auto",
        4,
    )
    assert (cfg.eval.initial_validation, cfg.optimizer.lr) == (False, 2e-4)


def test_litgpts_spellings():
    cfg = finetune(
        "lora",
        *("--checkpoint_dir", "m", "--data", "JSON", "--data.json_path", "d.json"),
        *("--data.val_split_fraction", "0.1", "--data.mask_prompt", "True", "--lora_r", "4"),
        *("--train.epochs", "2", "--train.lr_warmup_steps=3", "--optimizer.lr", "0.01"),
    )
    assert isinstance(cfg.data, JSON)
    assert (cfg.data.val_fraction, cfg.data.mask_prompt, cfg.lora_r) == (0.1, True, 4)
    assert (cfg.train.epochs, cfg.train.lr_warmup_steps, cfg.optimizer.lr) == (2, 3, 0.01)
    assert cfg.optimizer.weight_decay == 0.0  # only the learning rate was typed
    again = finetune(
        "full", "m", "--data", "LIMA", "--data.include_multiturn_conversations", "false"
    )
    assert (again.checkpoint_dir, type(again.data)) == ("m", LIMA)
    assert finetune("full", "--initial_checkpoint_dir", "m").checkpoint_dir == "m"
    late = finetune("full", "m", "--data.json_path", "d.json", "--data", "JSON", "--seed", "3")
    assert (late.data, late.seed) == (JSON(json_path="d.json"), 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "Alpacca"], r"--data Alpacca is not known.*Alpaca2k.*did you mean Alpaca\?"),
        (["--data", "json"], r"did you mean JSON\?"),
        (["--data", "TextFiles"], "--data TextFiles is not known.*JSON"),
        (["--data", "JSON"], "lacks a setting it needs. Add --data.json_path"),
        (["--data", "JSON", "--data.json_pth", "x"], "json_path"),
        (["--data.json_path", "x"], "belongs to a class that is not chosen.*JSON"),
        (["--data", "Alpaca", "--data.mask_prompt", "maybe"], "mask_prompt"),
        (["--data", "Alpaca", "--data.ignore_index", "-1"], "Leave it out: what is masked"),
        (["--train.packing", "best_fit"], "--train.packing .*true or false"),
        (["--train.tie_embeddings", "true"], "unknown option --train.tie_embeddings"),
        (["--quantize", "bnb.nf4"], "quantised weights is not there"),
        (["--access_token", "x"], "Set HF_TOKEN"),
        (["--model_name", "x"], "unknown option --model_name"),
        (["a", "b"], "unexpected word 'b'"),
    ],
)
def test_mistakes(words, says):
    with pytest.raises(UserError, match=says):
        finetune("full", *words)


def test_the_command_in_one_word_and_in_two(capsys):
    for words in (["finetune", "lora", "--help"], ["finetune_lora", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "usage: gristmill finetune lora" in capsys.readouterr().out
    assert cli.main(["finetune"]) == 0
    assert "finetune adapter" in capsys.readouterr().out
    assert cli.main(["finetune", "lorra"]) == 2
    assert "Did you mean finetune lora?" in capsys.readouterr().err
    for words in (["finetune", "adapter_v2", "m"], ["finetune_adapter_v2", "--help"]):
        assert cli.main(words) == 2
        assert "Use `gristmill finetune lora` with the same options" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = (
        "import sys; from gristmill.cli import main\n"
        "try: main(['finetune', 'full', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

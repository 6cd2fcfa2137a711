"""Options, recipes and older spellings become one typed configuration, or a clear error."""

import subprocess
import sys

import pytest
import yaml

from gristmill.cli import COMMANDS, corrected, main
from gristmill.config.commands import Pretrain
from gristmill.config.data import LitData, TextFiles
from gristmill.config.parse import parse, to_yaml
from gristmill.config.recipes import load_recipe, names
from gristmill.config.sections import AdamW
from gristmill.util.errors import UserError


def pretrain(*words):
    return parse(Pretrain, words, prog="gristmill pretrain", positionals=("model_name",))


def test_positional_and_option_spell_the_same_model():
    assert pretrain("pythia-14m") == pretrain("--model_name", "pythia-14m")
    assert pretrain("pythia-14m") == pretrain("--model_name=pythia-14m")


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("pretrain", "gristmill pretrain [MODEL_NAME] [OPTIONS]"),
        ("prepare", "gristmill prepare [LAYOUT] [OUTPUT_DIR] [OPTIONS]"),
        ("data stats", "gristmill data stats [DATA_PATH ...] [OPTIONS]"),
        ("quickstart", "gristmill quickstart [OPTIONS]"),
    ],
)
def test_help_says_which_words_a_command_takes(command, usage, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {usage}\n\n")


def test_numbers_booleans_and_both_option_forms():
    cfg = pretrain("x", "--train.max_tokens", "1_000_000", "--overwrite=True", "--resume", "auto")
    assert (cfg.train.max_tokens, cfg.overwrite, cfg.resume) == (1_000_000, True, "auto")
    assert pretrain("--overwrite", "true") == pretrain("--overwrite=True")
    assert pretrain("--overwrite") == pretrain("--overwrite", "true")
    assert pretrain("--overwrite", "--seed", "7") == pretrain("--seed", "7", "--overwrite", "true")


def test_negative_values_and_values_with_spaces_or_equals_survive():
    assert pretrain("--seed", "-1").seed == -1
    assert pretrain("--out_dir", "a b=c").out_dir == "a b=c"


def test_learning_rate_alone_keeps_the_default_optimizer():
    assert pretrain("--optimizer.lr", "0.005").optimizer == AdamW(lr=0.005)


def test_data_module_with_options_and_the_path_alias():
    cfg = pretrain("--data", "TextFiles", "--data.train_data_path", "folder")
    assert cfg.data == TextFiles(train_data_path="folder")
    assert pretrain("--data", "LitData", "--data.path", "d").data == LitData(data_path="d")


def test_a_directory_as_data_is_a_prepared_dataset(tmp_path):
    assert pretrain("--data", str(tmp_path)).data == LitData(data_path=str(tmp_path))


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_corpus.py").write_text(
        "from gristmill.config.data import DataModule\n"
        "class Mine(DataModule):\n"
        "    def __init__(self, size: int = 3):\n"
        "        self.size = size\n"
    )
    monkeypatch.chdir(tmp_path)  # where the command line is typed, which Python does not look at
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    assert pretrain("--data", "my_corpus:Mine", "--data.size", "5").data.size == 5


@pytest.mark.parametrize("recipe", [name for name in names() if name.startswith("pretrain/")])
def test_every_recipe_parses_and_round_trips(recipe):
    cfg = pretrain("--config", recipe)
    assert cfg.model_name or cfg.data
    assert parse_yaml(to_yaml(cfg)) == cfg


def parse_yaml(text, tmp=None):
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return pretrain("--config", file.name)


def test_printed_configuration_is_read_back(capsys, tmp_path):
    words = ["x", "--data", "TextFiles", "--data.train_data_path", "f", "--optimizer.lr", "0.5"]
    with pytest.raises(SystemExit) as stop:
        pretrain(*words, "--print_config")
    assert stop.value.code == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert pretrain("--config", str(path)) == pretrain(*words)


def test_options_override_the_configuration_in_order(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\ntrain:\n  max_steps: 7\n")
    assert pretrain("--config", str(path), "--seed", "2").seed == 2
    assert pretrain("--seed", "2", "--config", str(path)).seed == 1
    assert pretrain("--config", str(path), "--seed", "2").train.max_steps == 7


def test_litgpt_urls_and_paths_mean_the_bundled_recipe():
    url = (
        "https://raw.githubusercontent.com/Lightning-AI/litgpt/main/config_hub/pretrain/debug.yaml"
    )
    assert (
        load_recipe(url)
        == load_recipe("pretrain/debug")
        == load_recipe("config_hub/pretrain/debug.yaml")
    )


def test_litgpt_class_paths_are_understood(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "data": {
                    "class_path": "litgpt.data.TextFiles",
                    "init_args": {"train_data_path": "x"},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.25}},
            }
        )
    )
    cfg = pretrain("--config", str(path))
    assert (cfg.data, cfg.optimizer) == (TextFiles(train_data_path="x"), AdamW(lr=0.25))


@pytest.mark.parametrize(
    "setting",
    [
        {"hook": "os:system"},
        {"eval": {"command": "echo {model}"}},
        {"data": {"class_path": "evil.Data"}},
        {"data": {"class_path": "evil.TextFiles"}},
        {"data": "evil:Data"},
        {"data.class_path": "evil.Data"},
        {"train": {"class_path": "evil.Data"}},
        {"train": "train.yaml"},
    ],
)
def test_code_named_by_a_url_is_refused(setting, monkeypatch):
    monkeypatch.setattr("gristmill.config.parse.load_recipe", lambda source: dict(setting))
    with pytest.raises(UserError, match="names code to run"):
        pretrain("--config", "https://example.org/run.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--train.max_token", "6"],
            r"unknown option --train.max_token\. Did you mean --train.max_tokens",
        ),
        (["--train.max_tokens", "many"], r"--train.max_tokens many .* whole number or auto"),
        (["--train.max_tokens"], r"--train.max_tokens: expected one argument"),
        (["--data", "TextFile"], r"--data TextFile is not known.*did you mean TextFiles\?"),
        (["--data", "TextFiles"], r"Add --data.train_data_path"),
        (
            ["--data", "TextFiles", "--data.train_data_pat", "x"],
            r"Did you mean --data.train_data_path",
        ),
        (["--optimizer", "Adam"], r"--optimizer Adam is not known\. Choose AdamW"),
        (["--precision", "fp8"], r"--precision fp8 does not fit.*bf16-mixed"),
        (["--config", "nope"], r"no configuration file or recipe 'nope'.*pretrain/debug"),
        (["two", "words"], r"unexpected word 'words'"),
    ],
)
def test_mistakes_are_named(words, expected):
    if words[0] != "two":
        words = ["x", *words]
    with pytest.raises(UserError, match=expected):
        pretrain(*words)


def test_a_url_may_name_our_classes(monkeypatch):
    data = {"class_path": "litgpt.data.TextFiles", "init_args": {"train_data_path": "x"}}
    monkeypatch.setattr(
        "gristmill.config.parse.load_recipe",
        lambda source: {"data": data, "optimizer": "AdamW", "train": {"max_steps": 3}},
    )
    cfg = pretrain("--config", "https://example.org/run.yaml")
    assert (cfg.data, cfg.train.max_steps) == (TextFiles(train_data_path="x"), 3)


@pytest.mark.parametrize("option", ["--out_dir", "--data.train_data_path", "--resume"])
def test_a_name_that_is_empty_is_refused(option):
    with pytest.raises(UserError, match=f"{option} is empty"):
        pretrain("x", "--data", "TextFiles", option, "")


def test_bad_yaml_names_the_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("train:\n  max_tokens: [1\nseed: 2\n")
    with pytest.raises(UserError, match=r"not valid YAML \(line 3"):
        pretrain("--config", str(path))


def test_yaml_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="holds a list"):
        pretrain("--config", str(path))


def test_unknown_command_shows_the_nearest(capsys):
    assert main(["pretrai"]) == 2
    assert "pretrain" in capsys.readouterr().err


def test_corrected_command_replaces_and_adds():
    words = ["pretrain", "m", "--a", "1", "--b=2", "--c", "3"]
    fixed = corrected(words, {"--a": 9, "--b": 8, "--c": None, "--d": "x y"})
    assert fixed == "gristmill pretrain m --a 9 --b 8 --d 'x y'"


def test_printed_commands_hide_keys(capsys):
    words = ["serve", "m", "--api_key", "s3cret", "--access_token=s3cret=", "--port", "1"]
    fixed = corrected(words, {"--port": 2})
    assert fixed == "gristmill serve m --api_key … --access_token=… --port 2"
    # A key may look like an option, and the name of a script is put in our words.
    assert main(["scripts/prepare_redpajama.py", "--nonsense", "1", "--api_key", "--s3cret"]) == 2
    said = capsys.readouterr().err
    assert "prepare redpajama --nonsense 1 --api_key …" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["pretrain", "list"],
        ["pretrain"],
        ["pretrain", "--help"],
        ["pretrain", "--data.help", "TextFiles"],
        ["prepare", "list"],
    ],
)
def test_help_and_lists_import_no_torch(words):
    code = (
        "import sys\n"
        "from gristmill.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_names_things_that_exist():
    import importlib

    for name, command in COMMANDS.items():
        for target in (command.config, command.run, command.listing):
            if target:
                module, _, attribute = target.partition(":")
                assert hasattr(importlib.import_module(module), attribute), (name, target)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.lr", "fast"], r"--optimizer.lr fast does not fit\. It takes a number"),
        (["--overwrite", "perhaps"], r"--overwrite perhaps .* true or false"),
        (["--data.train_data_path", "x"], r"Add --data with one of: FineWeb, Jsonl, "),
        (["--data", "no.mod:Cls"], r"--data no.mod.Cls cannot be loaded \(No module named 'no'\)"),
    ],
)
def test_mistakes_inside_class_options_are_named(words, expected):
    with pytest.raises(UserError, match=expected):
        pretrain("x", *words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "train:\n  max_token: 3\n",
            "unknown option --train.max_token. Did you mean --train.max_t",
        ),
        ("optimiser: AdamW\n", "unknown option --optimiser. Did you mean --optimizer"),
    ],
)
def test_unknown_settings_in_a_configuration_show_the_nearest(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        pretrain("--config", str(path))


def test_a_wrong_word_deep_in_a_custom_model_is_named():
    with pytest.raises(UserError, match=r"unknown option --model_config\.moe\.num_expert\."):
        pretrain("--model_config.moe.num_expert", "4")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("moe.num_experts", "4", r"moe lacks a setting it needs\. Add \S+moe\.intermediate_size"),
        (
            "moe.num_experts",
            "four",
            r"moe\.num_experts four does not fit\. It takes a whole number;",
        ),
        ("rope_scaling.kind", "foo", r"kind foo does not fit\. It takes linear, dynamic, yarn"),
    ],
)
def test_a_wrong_value_deep_in_a_custom_model_is_named(option, value, message):
    with pytest.raises(UserError, match=message):
        pretrain(f"--model_config.{option}", value)

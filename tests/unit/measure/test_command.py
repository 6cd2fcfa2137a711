"""The command: what it measures, where it puts what, and what it refuses."""

import json
import shutil

import pytest
import torch

from gristmill.cli import main
from gristmill.formats.model_dir import load_model
from gristmill.measure import harness, tasks
from gristmill.measure.harness import Entry
from gristmill.util.extras import install_command

from .models import write_model

pytest.importorskip("lm_eval")

PAIRS = """task: my_pairs
tag: my_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
num_fewshot: 0
metric_list: [{{metric: acc}}]
"""
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Another one, with a chat template and a longer context."""
    return write_model(tmp_path_factory.mktemp("other"), context=128, template=TEMPLATE)


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    rows = [{"good": f"a b {n}", "bad": f"b a {n}"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_pairs.yaml").write_text(PAIRS.format(file=folder / "pairs.jsonl"))
    return folder


@pytest.fixture
def measure(model, own_tasks, capsys):
    """Runs the command and returns (exit code, stdout, stderr)."""

    def run(*options, path=model, task="my_pairs"):
        words = ["evaluate", str(path), "--include_path", str(own_tasks), "--device", "cpu"]
        code = main([*words, "--tasks", task, *map(str, options)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_results_are_kept_and_older_ones_too(measure, tmp_path):
    file = tmp_path / "deep" / "r.json"
    options = ("--save_filepath", file, "--log_samples", "true")
    for limit in (3, 5):
        code, out, err = measure(*options, "--limit", limit)
        assert code == 0, err
    assert "|my_pairs|" in out
    assert out.splitlines()[-1].startswith("my_pairs acc ")
    assert out.splitlines()[-1].endswith(f"({file})")
    newest = json.loads(file.read_text())
    assert newest["n-samples"]["my_pairs"]["effective"] == 5
    assert newest["config"]["precision"] == "32-true"
    assert newest["config"]["options"]["limit"] == 5
    older = json.loads(file.with_name("r-1.json").read_text())
    assert older["n-samples"]["my_pairs"]["effective"] == 3
    assert len((tmp_path / "deep/r.samples/my_pairs.jsonl").read_text().splitlines()) == 5
    assert len((tmp_path / "deep/r-1.samples/my_pairs.jsonl").read_text().splitlines()) == 3
    assert "on cpu" in err
    assert "common beginnings once" in err


def test_a_tag_and_a_pattern_name_tasks(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "known", lambda: {"far": Entry(None, [])})
    for task in ("my_tag", "my_p*"):
        code, out, err = measure("--save_filepath", tmp_path / "r.json", task=task)
        assert code == 0, err
        assert "|my_pairs|" in out


def test_fewshot_that_a_task_does_not_take_is_told(measure, tmp_path):
    code, _, err = measure("--save_filepath", tmp_path / "r.json", "--num_fewshot", 2)
    assert code == 0
    assert "--num_fewshot 2 is not for every task (my_pairs: 0)" in err


def test_out_dir_gets_a_hugging_face_directory(measure, model, other_model, tmp_path):
    out = tmp_path / "hf"
    assert measure("--out_dir", out)[0] == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "results.json"} <= {
        path.name for path in out.iterdir()
    }
    torch.testing.assert_close(load_model(out).state_dict(), load_model(model).state_dict())
    code, _, err = measure("--out_dir", out)
    assert code == 0
    assert "is this model already" in err
    code, _, err = measure("--out_dir", out, path=other_model)
    assert code == 2
    assert "holds another model" in err
    assert "--force_conversion true" in err
    assert load_model(out).config.max_seq_length == 96
    assert measure("--out_dir", out, "--force_conversion", "true", path=other_model)[0] == 0
    assert load_model(out).config.max_seq_length == 128
    assert sorted(path.name for path in out.glob("results*.json")) == [
        "results-1.json",
        "results-2.json",
        "results.json",
    ]
    assert not list(out.glob(".*"))


def test_out_dir_may_be_the_model_and_not_a_run(measure, model, tmp_path):
    code, _, err = measure("--out_dir", model, "--save_filepath", tmp_path / "r.json")
    assert code == 0
    assert "is this model already" in err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text("")
    code, _, err = measure("--out_dir", tmp_path / "run")
    assert code == 2
    assert "holds a run" in err


def test_results_go_beside_the_weights(measure, other_model):
    assert measure(path=other_model)[0] == 0
    assert (other_model / "evaluate/results.json").is_file()


def test_results_of_what_goes_are_kept_by_the_run(measure, model, tmp_path):
    run = tmp_path / "run"
    for place in ("step-00000004", "eval/weights/step-00000008"):
        shutil.copytree(model, run / place)
    (run / "run.yaml").write_text("")
    for place in ("step-00000004", "eval/weights/step-00000008"):
        assert measure(path=run / place)[0] == 0
    kept = sorted(str(path.relative_to(run)) for path in run.rglob("results.json"))
    assert kept == [f"evaluate/step-0000000{n}/results.json" for n in (4, 8)]


def test_a_model_for_chats_is_asked_in_its_template(measure, model, other_model, tmp_path):
    options = ("--apply_chat_template", "true", "--save_filepath", tmp_path / "r.json")
    more = ("--log_samples", "true", "--system_instruction", "Be brief.")
    code, _, err = measure(*options, *more, path=other_model)
    assert code == 0, err
    sample = json.loads((tmp_path / "r.samples/my_pairs.jsonl").read_text().splitlines()[0])
    assert sample["arguments"][0][0].startswith("[Be brief.][")
    code, _, err = measure(*options, path=model)
    assert code == 2
    assert "has no chat template" in err


@pytest.mark.parametrize(("multiturn", "turns"), [("true", 4), ("false", 2)])
def test_examples_are_turns_of_a_chat_or_part_of_the_question(
    measure, own_tasks, other_model, tmp_path, multiturn, turns
):
    text = (own_tasks / "my_pairs.yaml").read_text().replace("my_pairs", "shots")
    text = text.replace('doc_to_text: ""', 'doc_to_text: "which?"')
    (tmp_path / "shots.yaml").write_text(text.replace("num_fewshot: 0", "fewshot_split: test"))
    code, _, err = measure(
        *("--include_path", tmp_path, "--apply_chat_template", "--system_instruction", "Hm."),
        *("--fewshot_as_multiturn", multiturn, "--num_fewshot", 1, "--log_samples"),
        *("--save_filepath", tmp_path / "r.json"),
        path=other_model,
        task="shots",
    )
    assert code == 0, err
    sample = json.loads((tmp_path / "r.samples/shots.jsonl").read_text().splitlines()[0])
    assert sample["arguments"][0][0].count("[") == turns


def test_one_of_several_processes_is_refused(measure, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = measure()
    assert code == 2
    assert "4 processes were started, and an evaluation is one" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "-1"), "--limit -1.0 is no number of documents"),
        (("--num_fewshot", "-1"), "--num_fewshot -1 is no number"),
        (("--batch_size", "0"), "--batch_size 0 is no size"),
        (("--batch_size", "auto:x"), "--batch_size auto:x is no size"),
        (("--force_conversion", "true"), "is for the model in --out_dir"),
        (("--fewshot_as_multiturn", "false"), "says how examples are put in a chat"),
        (("--tokenizer_dir", "/nowhere"), "no tokenizer at /nowhere"),
        (("--dtype", "bfloat16", "--precision", "32-true"), "are not the same"),
        (("--device", "tpu"), "unknown device (tpu)"),
        (("--include_path", "/nowhere"), "--include_path /nowhere is no folder"),
        (("--gen_kwargs", "nonsense"), "--gen_kwargs nonsense is no list of settings"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_read(measure, monkeypatch, options, message):
    monkeypatch.setattr(
        "gristmill.measure.subject.load_aloud", lambda *_, **__: pytest.fail("was read")
    )
    code, _, err = measure(*options)
    assert code == 2
    assert message in err


def test_a_place_that_cannot_be_written(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "gristmill.measure.subject.load_aloud", lambda *_, **__: pytest.fail("was read")
    )
    code, _, err = measure("--save_filepath", tmp_path)
    assert code == 2
    assert f"--save_filepath {tmp_path / 'results.json'}" in err
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, err = measure("--save_filepath", tmp_path / "r.json")
    assert code == 2
    assert "cannot be written" in err


def test_a_task_that_is_not_there(measure, monkeypatch):
    monkeypatch.setattr(tasks, "known", lambda: {"hellaswag": Entry("/x.yaml", [])})
    code, _, err = measure(task="helaswag")
    assert code == 2
    assert "there is no task 'helaswag' among 3. Did you mean hellaswag?" in err
    code, _, err = measure(task=",")
    assert code == 2
    assert "no task is named" in err


def test_data_that_cannot_be_had(measure, own_tasks, tmp_path):
    text = (own_tasks / "my_pairs.yaml").read_text().replace("my_pairs", "far_away")
    text = text.replace("dataset_path: json", "dataset_path: nobody/nothing-of-this-name")
    (tmp_path / "far.yaml").write_text(text)
    code, _, err = measure("--include_path", tmp_path, task="far_away")
    assert code == 1
    assert "the data of the task far_away could not be fetched, the hub was not reached" in err
    broken = (own_tasks / "my_pairs.yaml").read_text().replace("test_split: test", "test_split: x")
    (tmp_path / "far.yaml").write_text(broken.replace("my_pairs", "broken"))
    code, _, err = measure("--include_path", tmp_path, task="broken")
    assert code == 2
    assert "the task broken failed (" in err


def test_the_list_is_read_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    found = {"b": Entry("/b.yaml", []), "a": Entry(None, ["b"])}
    monkeypatch.setattr(harness, "entries", lambda folders: calls.append(folders) or found)
    for _ in range(2):
        assert main(["evaluate", "list"]) == 0
        assert capsys.readouterr().out.split() == ["a", "b"]
    assert calls == [None]
    (file,) = (tmp_path / "gristmill/evaluate").iterdir()
    file.write_text("{damaged")
    assert tasks.names() == ["a", "b"]
    assert len(calls) == 2


def test_a_list_that_cannot_be_kept_leaves_nothing(monkeypatch, tmp_path):
    def full(*_):
        raise OSError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(harness, "entries", lambda folders: {"a": Entry(None, [])})
    monkeypatch.setattr("os.replace", full)
    assert tasks.names() == ["a"]
    assert not list((tmp_path / "gristmill/evaluate").iterdir())


def test_folders_of_a_group_are_those_of_its_parts(monkeypatch, tmp_path):
    listed = {
        "all": Entry("/p/all/all.yaml", ["tag", "c"]),
        "tag": Entry(None, ["a", "b"]),
        "a": Entry("/p/a/a.yaml", []),
        "b": Entry("/p/a/deep/b.yaml", []),
        "c": Entry("/p/c/c.yaml", []),
        "d": Entry("/p/d/d.yaml", []),
    }
    monkeypatch.setattr(tasks, "known", lambda: listed)
    chosen = tasks.choose(["all"], [])
    assert chosen.names == ["all"]
    assert chosen.folders == ["/p/a", "/p/all", "/p/c"]
    own = {"c": Entry(str(tmp_path / "c.yaml"), []), "mine": Entry(str(tmp_path / "m"), ["a", "c"])}
    monkeypatch.setattr(harness, "entries", lambda folders: own)
    chosen = tasks.choose(["mine"], [str(tmp_path)])
    assert chosen.folders == ["/p/a", str(tmp_path)]


def test_without_the_package_it_says_what_to_install(monkeypatch, model, capsys):
    def missing(name):
        raise harness.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness.importlib.metadata, "version", missing)
    assert main(["evaluate", str(model), "--tasks", "x"]) == 2
    assert install_command("evaluate") in capsys.readouterr().err

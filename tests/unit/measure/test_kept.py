"""What a stopped evaluation has computed is there for the next one, and only for one like it."""

import json

import pytest
import torch

from gristmill.cli import main
from gristmill.config.evaluate import Evaluate
from gristmill.formats.model_dir import open_model_dir
from gristmill.measure import command
from gristmill.measure.kept import Kept
from gristmill.measure.score import Scorer
from gristmill.measure.subject import Subject

from .models import write_model

pytest.importorskip("lm_eval")

TASK = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
CHOICES = """task: choices
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[good, bad]}}"
"""
TEXTS = """task: texts
output_type: generate_until
doc_to_text: "{{good}}"
generation_kwargs: {do_sample: true, temperature: 1.0, max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """A task of 40 pairs and one of 20 texts that are drawn."""
    folder = tmp_path_factory.mktemp("own")
    rows = [json.dumps({"good": f"a b {n}", "bad": f"b a {n}"}) for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    common = TASK.format(file=folder / "pairs.jsonl")
    (folder / "choices.yaml").write_text(common + CHOICES)
    (folder / "texts.yaml").write_text(common.partition("metric_list")[0] + TEXTS)
    return folder


@pytest.fixture
def measure(model, own_tasks, tmp_path, capsys):
    """Runs the command; (exit code, stderr)."""

    def run(*options, path=model):
        words = ["evaluate", str(path), "--include_path", str(own_tasks), "--device", "cpu"]
        words += ["--save_filepath", str(tmp_path / "r.json"), "--tasks", "choices,texts"]
        code = main([*words, "--log_samples", *map(str, options)])
        return code, capsys.readouterr().err

    return run


def samples(folder):
    return {
        file.name: [json.loads(line)["resps"] for line in file.read_text().splitlines()]
        for file in folder.glob("*.jsonl")
    }


def stop_after(monkeypatch, count):
    """Press Ctrl-C when answers were kept so many times."""
    whole, calls = Kept.put, []

    def put(self, entries):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        whole(self, entries)

    monkeypatch.setattr(Kept, "put", put)


@pytest.mark.parametrize("count", [1, 20], ids=["among choices", "among texts"])
def test_a_stopped_evaluation_goes_on(measure, monkeypatch, tmp_path, count):
    assert measure("--batch_size", "4", "--save_filepath", tmp_path / "whole.json")[0] == 0
    whole = samples(tmp_path / "whole.samples")
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        code, err = measure("--batch_size", "4")
    assert code == 130
    assert f"answers are kept in {tmp_path / 'r.answers'}; the same command goes on" in err
    assert not (tmp_path / "r.json").exists()
    code, err = measure("--batch_size", "4")
    assert code == 0
    assert f"answers are there already ({tmp_path / 'r.answers'})" in err
    found = samples(tmp_path / "r.samples")
    assert found["texts.jsonl"] == whole["texts.jsonl"], "drawn as they would have been"
    for ours, theirs in zip(found["choices.jsonl"], whole["choices.jsonl"], strict=True):
        assert [pair[0][0] for pair in ours] == pytest.approx([pair[0][0] for pair in theirs])
    assert not (tmp_path / "r.answers").exists()


def test_a_cache_stays_and_is_for_these_weights_alone(measure, monkeypatch, tmp_path):
    cache = tmp_path / "deep" / "cache"
    assert measure("--use_cache", cache)[0] == 0
    kept = cache.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "_run", lambda *_: pytest.fail("computed again"))
        assert measure("--use_cache", cache)[0] == 0
    assert cache.read_text() == kept
    other = tmp_path / "other"
    other.mkdir()
    assert "are there already" not in measure("--use_cache", cache, path=write_model(other))[1]
    assert "are there already" not in measure("--use_cache", cache, "--precision", "bf16-true")[1]
    assert len(cache.read_text()) > 2 * len(kept)


def test_answers_survive_a_torn_line_and_a_full_disk(tmp_path, monkeypatch, capsys):
    path = tmp_path / "answers"
    with Kept(path, "m", forever=True) as kept:
        kept.put([(kept.key([1], [2]), (-1.5, True)), (kept.key("text"), ["written\n"])])
    with path.open("a") as file:
        file.write('["abc", -1')
    again = Kept(path, "m", forever=True)
    assert again.find([again.key([1], [2]), again.key([9], [2])]) == [[-1.5, True], None]
    again.put([(again.key([9], [2]), (float("-inf"), False))])
    third = Kept(path, "m")
    assert third.find([third.key([9], [2]), third.key("text")]) == [
        [float("-inf"), False],
        ["written\n"],
    ]
    assert Kept(path, "n").find([Kept(path, "n").key("text")]) == [None]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    for _ in range(2):
        third.put([(third.key("more"), ["x"])])
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_what_another_stopped_evaluation_left_stays(tmp_path):
    path = tmp_path / "answers"
    stopped = Kept(path, "m")
    stopped.put([(stopped.key("long"), ["half of it"])])
    stopped.__exit__(KeyboardInterrupt)
    with Kept(path, "m") as other:
        other.put([(other.key("short"), ["all"])])
    with Kept(path, "m") as again:
        assert again.find([again.key("long"), again.key("short")]) == [["half of it"], None]
    assert not path.exists()


def test_another_evaluation_keeps_its_file(tmp_path):
    first, second = (Kept(tmp_path / "answers", "m") for _ in range(2))
    with first, second:
        first.put([("a", [1])])
        second.put([("b", [2])])
        first.__exit__(None, None, None)
        assert (tmp_path / "answers").exists()
    assert not (tmp_path / "answers").exists()


def test_a_model_trained_further_is_another(model):
    before = command._weights(open_model_dir(model))
    assert before == command._weights(open_model_dir(model))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert before != command._weights(open_model_dir(model))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_rounded_weights_are_measured(model, quantize):
    if quantize:
        pytest.importorskip("torchao")
    subject = Subject(
        model, device="cpu", precision="32-true", batch_size=1, seed=0, quantize=quantize
    )
    plain = Subject(model, device="cpu", precision="32-true", batch_size=1, seed=0)
    (found,), (exact,) = (s.answers([("the mill", " turns")]) for s in (subject, plain))
    assert found.log_likelihood == pytest.approx(exact.log_likelihood, rel=0.02)
    assert (found == exact) is (quantize is None)
    assert subject.describe()["quantize"] == quantize


def test_seeds_are_those_of_lm_eval(model, own_tasks, tmp_path):
    cfg = Evaluate(
        checkpoint_dir=str(model),
        tasks="choices",
        include_path=str(own_tasks),
        save_filepath=str(tmp_path / "r.json"),
    )
    assert command.measure(cfg)["n-samples"]["choices"]["effective"] == 40
    assert torch.initial_seed() == 1234

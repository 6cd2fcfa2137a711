import re
from dataclasses import replace

import pytest
import torch

from gristmill.config.use_commands import Generate, Sampling
from gristmill.formats import hf
from gristmill.formats.model_dir import load_model
from gristmill.infer.generate import generate
from gristmill.infer.load import load, model_name, use_few_threads
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError


def run(capsys, path, **options):
    """What the command wrote: (stdout, stderr)."""
    capsys.readouterr()
    settings = {"prompt": "the mill", "precision": "32-true", "max_new_tokens": 12, **options}
    generate(Generate(checkpoint_dir=str(path), device="cpu", **settings))
    return capsys.readouterr()


def test_stdout_is_the_continuation_alone(base_model, capsys):
    shown = run(capsys, base_model, temperature=0)
    loaded = load(base_model, "cpu", "32-true")
    ids = loaded.tokenizer.encode("the mill", bos=True)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    text = loaded.tokenizer.decode(ids)
    assert shown.out == text.removeprefix("the mill") + "\n"
    assert "the mill" in shown.err


def test_stderr_says_what_computes_and_how_fast(base_model, capsys):
    err = run(capsys, base_model).err
    assert re.search(
        r"Model: model \([\d.]+ K parameters, context 96 tokens\) on cpu .*32-true", err
    )
    assert re.search(r"Time for inference: [\d.]+ sec total, [\d.]+ tokens/sec, 12 tokens", err)
    assert re.search(r"Memory used: [\d.]+ GB", err)


def test_samples_differ_and_repeat_with_their_seeds(base_model, capsys):
    both = run(capsys, base_model, num_samples=2, seed=5).out
    first = run(capsys, base_model, seed=5).out
    second = run(capsys, base_model, seed=6).out
    assert first != second
    assert both == first + second


def test_bos_follows_the_files(base_model):
    loaded = load(base_model, "cpu", "32-true")
    assert loaded.prompt_ids("a")[0] == loaded.tokenizer.bos_id
    config = base_model / "tokenizer_config.json"
    text = config.read_text()
    config.write_text(text.replace('"add_bos_token": true', '"add_bos_token": false'))
    try:
        without = load(base_model, "cpu", "32-true")
        assert without.tokenizer.bos_id not in without.prompt_ids("a")
        assert without.prompt_ids("") == [without.tokenizer.bos_id]
    finally:
        config.write_text(text)


def test_context_end_is_said(base_model, capsys):
    shown = run(capsys, base_model, max_new_tokens=500, seed=3)
    # A random model may end by itself; then it needs no remark.
    ended = "context is full (96 tokens" in shown.err
    tokens = int(re.search(r"(\d+) tokens \(first", shown.err)[1])
    prompt = len(load(base_model, "cpu", "32-true").prompt_ids("the mill"))
    assert ended == (tokens == 96 - prompt)


def test_long_prompt_is_refused_with_its_length(base_model, capsys):
    with pytest.raises(UserError, match=r"201 tokens of 96.*at most 95"):
        run(capsys, base_model, prompt="x" * 200)


def test_wrong_directories(tmp_path, base_model):
    for path, message in (
        (None, "no model given.*gristmill generate"),
        (str(tmp_path / "nowhere"), "nowhere does not exist.*[Nn]ame a model directory"),
        (str(tmp_path), "no config.json"),
        (str(base_model / "config.json"), "is no model file"),
    ):
        with pytest.raises(UserError, match=message):
            generate(Generate(checkpoint_dir=path))


def test_model_without_tokenizer(base_model, tmp_path):
    for file in base_model.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match="no tokenizer at .*gristmill tokenizer train"):
        generate(Generate(checkpoint_dir=str(tmp_path)))


def test_foreign_tokenizer_is_named_as_the_cause(base_model, monkeypatch):
    loaded = load(base_model, "cpu", "32-true")
    monkeypatch.setattr(Tokenizer, "encode", lambda *_args, **_kw: [1, 260])
    with pytest.raises(UserError, match=r"tokenizer does not belong.*id 260, model has 260"):
        loaded.prompt_ids("a")


def test_no_samples_is_refused(base_model, capsys):
    with pytest.raises(UserError, match="num_samples 0"):
        run(capsys, base_model, num_samples=0)


def test_ctrl_c_keeps_what_was_written(base_model, capsys, monkeypatch):
    calls = []

    def interrupt(self, token):
        calls.append(token)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return " word"

    monkeypatch.setattr("gristmill.tokenizer.stream.StreamDecoder.put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, base_model, prompt="abc", seed=1)
    shown = capsys.readouterr()
    # Four calls went to the prompt: BOS and three letters.
    assert shown.out == " word" * 8 + "\n"
    assert "Time for inference" in shown.err


def test_names_for_people():
    assert model_name("out/run-1/final") == "run-1/final"
    assert model_name("out/run-1/step-00000010/") == "run-1/step-00000010"
    assert model_name("checkpoints/org/pythia-14m") == "pythia-14m"


@pytest.mark.parametrize(
    ("limit", "wish", "threads"), [(10**6, None, 1), (10, None, 2), (10**6, "2", 2)]
)
def test_small_models_decode_on_one_thread(base_model, monkeypatch, limit, wish, threads):
    loaded = load(base_model, "cpu", "32-true")
    monkeypatch.setattr("gristmill.infer.load.ONE_THREAD_PARAMETERS", limit)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        use_few_threads(loaded)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_it_goes_on(base_model, capsys, monkeypatch):
    monkeypatch.setattr("gristmill.models.decoding.Context.compile", lambda self: "no compiler")
    shown = run(capsys, base_model, compile="auto", seed=2)
    assert shown.out == run(capsys, base_model, seed=2).out
    assert "Not compiled (no compiler); going on without." in shown.err


def test_rows_behind_the_tokenizer_are_never_chosen(base_model, tmp_path):
    """A directory of another tool says nothing of rows that only fill up the embedding."""
    model = load_model(base_model)
    state = dict(model.state_dict())
    for name in ("embed.weight", "head.weight"):
        # Of length 100 in all directions: one of them has the largest logit wherever it is asked.
        state[name] = torch.cat([state[name], 100 * torch.eye(32), -100 * torch.eye(32)[:8]])
    config = replace(model.config, vocab_size=300, num_token_ids=None)
    hf.write(tmp_path / "padded", config, state, tokenizer_dir=base_model)
    loaded = load(tmp_path / "padded", "cpu", "32-true")
    ids = loaded.prompt_ids("Some text")
    assert max(loaded.stream(ids, Sampling(max_new_tokens=20, temperature=0.0))) < 260

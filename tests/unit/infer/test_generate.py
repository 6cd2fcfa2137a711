import json
import os
import re
from dataclasses import replace

import pytest
import torch

from gristmill.config.use_commands import Generate, Sampling
from gristmill.formats import hf
from gristmill.formats.model_dir import load_model
from gristmill.infer import generate as generate_module
from gristmill.infer.generate import generate
from gristmill.infer.load import emit, load, model_name, use_few_threads
from gristmill.infer.results import ResultFile
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError

from .conftest import make_model


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


def test_a_log_of_both_streams_has_the_text_in_one_piece(base_model, capsys, tmp_path, monkeypatch):
    alone = run(capsys, base_model, temperature=0).out
    with open(tmp_path / "log", "w") as both, open(tmp_path / "err", "w") as apart:
        monkeypatch.setattr("sys.stdout", both)
        monkeypatch.setattr("sys.stderr", both)
        run(capsys, base_model, temperature=0)
        monkeypatch.setattr("sys.stderr", apart)
        run(capsys, base_model, temperature=0)
    log, err = (tmp_path / "log").read_text(), (tmp_path / "err").read_text()
    assert f"\nthe mill{alone}Time for inference" in log
    assert log.endswith(alone)
    assert "\nthe mill\nTime for inference" in err


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
    monkeypatch.setattr("gristmill.models.batching.Batch.compile", lambda self: "no compiler")
    shown = run(capsys, base_model, compile="auto", batch_size=2)
    assert "Not compiled (no compiler); going on without." in shown.err
    with pytest.raises(UserError, match=r"cannot compile \(no compiler\). leave --compile out"):
        run(capsys, base_model, compile=True, batch_size=2)


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


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt_file(tmp_path, *prompts):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(prompt + "\n" for prompt in prompts))
    return str(path)


PROMPTS = ["the mill", "a", "ran under a grey stone wheel", "old Anna"]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5}, {"repetition_penalty": 1.4}])
def test_prompts_of_a_file_are_continued_as_each_alone(base_model, tmp_path, capsys, options):
    alone = [run(capsys, base_model, prompt=prompt, **options).out for prompt in PROMPTS]
    file = prompt_file(tmp_path, *PROMPTS)
    for batch_size in (1, 3, "auto"):
        together = run(
            capsys, base_model, prompt=None, prompt_file=file, batch_size=batch_size, **options
        )
        assert together.out == "".join(alone)
        positions = [together.err.index(prompt + "\n") for prompt in PROMPTS]
        assert positions == sorted(positions)
    assert "48 tokens in 4 texts" in together.err


def test_samples_at_once_are_those_one_after_the_other(base_model, capsys):
    one_by_one = run(capsys, base_model, num_samples=3, seed=2)
    at_once = run(capsys, base_model, num_samples=3, seed=2, batch_size=3)
    assert at_once.out == one_by_one.out
    assert "Writing 3 texts, 3 at a time." in at_once.err


def test_output_has_everything(base_model, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "the mill", "id": 7}\n{"prompt": "a"}\n')
    options = {"prompt": None, "prompt_file": str(source), "num_samples": 2, "seed": 3}
    shown = run(capsys, base_model, output=str(out), **options)
    assert shown.out == ""
    assert f"Texts: {out}" in shown.err
    records = lines(out)
    assert [(r["prompt"], r["sample"], r["seed"]) for r in records] == [
        ("the mill", 0, 3),
        ("the mill", 1, 4),
        ("a", 0, 3),
        ("a", 1, 4),
    ]
    assert records[0]["id"] == records[1]["id"] == 7
    alone = run(capsys, base_model, prompt="a", seed=4).out
    assert records[3]["completion"] + "\n" == alone
    assert (records[3]["prompt_tokens"], records[3]["tokens"]) == (2, 12)
    assert records[3]["stop"] == "max_new_tokens"
    piped = run(capsys, base_model, output="-", **options).out
    assert piped == out.read_text()


def test_interrupted_output_goes_on(base_model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    options = {"prompt": None, "prompt_file": prompt_file(tmp_path, *PROMPTS), "batch_size": 1}
    run(capsys, base_model, output=str(tmp_path / "whole.jsonl"), **options)
    add, added = ResultFile.add, []

    def interrupted(self, place, record):
        add(self, place, record)
        added.append(place)
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFile, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, base_model, output=str(out), **options)
    assert re.search(r"2 of 4 texts are kept in .*out.jsonl.partial", capsys.readouterr().err)
    shown = run(capsys, base_model, output=str(out), **options)
    assert "2 texts are there already" in shown.err
    assert added == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_texts_of_other_weights_are_not_gone_on_with(tmp_path, capsys, monkeypatch):
    model = make_model(tmp_path / "made")
    out = tmp_path / "out.jsonl"
    options = {"prompt": None, "prompt_file": prompt_file(tmp_path, *PROMPTS), "batch_size": 1}
    add = ResultFile.add

    def interrupted(self, place, record):
        add(self, place, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultFile, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, model, output=str(out), **options)
    monkeypatch.undo()
    weights = next(model.glob("*.safetensors"))
    # Rewritten by a training, say, under the same name and of the same size.
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1000))
    with pytest.raises(UserError, match="holds texts of another command"):
        run(capsys, model, output=str(out), **options)


def test_stop_texts_end_a_text_and_are_left_out(base_model, tmp_path, capsys):
    whole = run(capsys, base_model, temperature=0, max_new_tokens=30).out
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    cut = run(capsys, base_model, temperature=0, max_new_tokens=30, stop=stop)
    assert cut.out == expected + "\n"
    out = tmp_path / "out.jsonl"
    options = {"temperature": 0, "max_new_tokens": 30, "stop": ["never", stop]}
    run(capsys, base_model, output=str(out), **options)
    assert (lines(out)[0]["completion"], lines(out)[0]["stop"]) == (expected, "stop")


def test_special_tokens_in_a_prompt(base_model, chat_model, capsys):
    loaded = load(chat_model, "cpu", "32-true")
    plain = loaded.prompt_ids("a<|end|>")
    read = loaded.prompt_ids("a<|end|>", special=True)
    assert len(read) == 3 < len(plain)
    # A prompt that begins with BOS does not get a second one.
    bos = loaded.tokenizer.bos_id
    assert loaded.prompt_ids("<bos>a", special=True) == [bos, *loaded.tokenizer.encode("a")]
    err = run(capsys, chat_model, prompt="a<|end|><|start|>").err
    assert "<|end|>, <|start|> in a prompt is plain text; --special_tokens true" in err
    assert "plain text" not in run(capsys, chat_model, prompt="<|end|>", special_tokens=True).err


def test_a_prompt_in_the_chat_template(chat_model, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    source = tmp_path / "p.jsonl"
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    source.write_text(json.dumps({"messages": messages}))
    options = {"temperature": 0}
    run(capsys, chat_model, prompt=None, prompt_file=str(source), output=str(out), **options)
    reply = lines(out)[0]["completion"]
    assert run(capsys, chat_model, prompt="hi", system="be kind", **options).out == reply + "\n"
    assert run(capsys, chat_model, prompt="hi", chat=True, **options).out != reply + "\n"
    with pytest.raises(UserError, match=r"have a system prompt already"):
        run(capsys, chat_model, prompt=None, prompt_file=str(source), system="no", **options)


def test_only_replies_end_as_the_template_ends_them(chat_model, tmp_path, capsys, monkeypatch):
    loaded = load(chat_model, "cpu", "32-true")
    source = tmp_path / "p.jsonl"
    asked = {"messages": [{"role": "user", "content": "hi"}]}
    source.write_text("\n".join(map(json.dumps, [{"prompt": "the mill"}, asked])))
    options = {"prompt": None, "prompt_file": str(source), "temperature": 0, "output": "-"}
    options |= {"max_new_tokens": 12, "precision": "32-true"}

    def texts():
        return [json.loads(line) for line in run(capsys, chat_model, **options).out.splitlines()]

    ends = set()
    monkeypatch.setattr(generate_module, "reply_stop_ids", lambda _: frozenset(ends))
    whole = texts()
    assert [text["stop"] for text in whole] == ["max_new_tokens"] * 2
    ends |= set(loaded.tokenizer.encode(whole[0]["completion"] + whole[1]["completion"][4:]))
    plain, reply = texts()
    assert plain == whole[0]
    assert reply["stop"] == "eos"
    assert reply["tokens"] < 12
    assert whole[1]["completion"].startswith(reply["completion"])


def test_special_tokens_in_a_chat_are_refused(chat_model, tmp_path, capsys):
    for options in ({"chat": True}, {"system": "be kind"}):
        with pytest.raises(UserError, match="the prompt is put into the chat template"):
            run(capsys, chat_model, special_tokens=True, **options)
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "<|end|>"}]}\n')
    with pytest.raises(UserError, match="chat template") as refused:
        run(capsys, chat_model, prompt=None, prompt_file=str(source), special_tokens=True)
    assert refused.value.fix == {"--special_tokens": None}


def test_a_chat_without_a_template(base_model, capsys):
    for options in ({"chat": True}, {"system": "be kind"}):
        with pytest.raises(UserError, match="needs a chat template, and model has none"):
            run(capsys, base_model, **options)


def test_another_tokenizer(base_model, tmp_path, capsys):
    for file in base_model.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    expected = run(capsys, base_model, temperature=0).out
    assert run(capsys, tmp_path, temperature=0, tokenizer_dir=str(base_model)).out == expected
    with pytest.raises(UserError, match="no tokenizer at"):
        run(capsys, base_model, tokenizer_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"overwrite": True}, "replaces the file of --output"),
        ({"prompt_file": "p.txt"}, "both given"),
        ({"output": "."}, "is a directory"),
        ({"min_p": 2.0}, "min_p"),
        ({"stop": ["a", ""]}, "a stop text is empty"),
    ],
)
def test_options_that_cannot_be(base_model, capsys, options, message):
    with pytest.raises(UserError, match=message):
        run(capsys, base_model, **options)


def test_mistakes_in_a_file_name_the_line_before_anything_is_written(base_model, tmp_path, capsys):
    file = prompt_file(tmp_path, "fine", "", "x" * 200)
    with pytest.raises(UserError, match=r"line 3 of .*prompts.txt: the prompt leaves no room"):
        run(capsys, base_model, prompt=None, prompt_file=file)
    assert "Writing" not in capsys.readouterr().err
    source = tmp_path / "p.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(UserError, match=r"line 1 of .*the results have too \(completion\)"):
        run(capsys, base_model, prompt=None, prompt_file=str(source), output="-")


def test_control_characters_do_not_reach_a_terminal(capsys, monkeypatch):
    text = "a\tb\n\x1b[2J\r\x7f\x9bü"
    emit(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    emit(text)
    assert capsys.readouterr().out == "a\tb\n␛[2J␍␡\ufffdü"

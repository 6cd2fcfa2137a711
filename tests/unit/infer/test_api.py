import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import gristmill
from gristmill.config.commands import Prepare, Pretrain
from gristmill.config.evaluate import Evaluate
from gristmill.config.finetune import FinetuneAdapter, FinetuneLora
from gristmill.config.sections import AdamW
from gristmill.config.tuning_data import JSON, Alpaca2k
from gristmill.config.use_commands import Generate
from gristmill.util.errors import UserError


@pytest.fixture(scope="module")
def llm(base_model):
    return gristmill.LLM.load(base_model, device="cpu", precision="32-true")


def test_stream_is_the_text_in_pieces(llm):
    text = llm.generate("the mill", max_new_tokens=20, seed=3)
    pieces = list(llm.generate("the mill", max_new_tokens=20, seed=3, stream=True))
    assert "".join(pieces) == text
    assert len(pieces) > 2


def test_seed_decides(llm):
    assert llm.generate("a", 20, seed=1) == llm.generate("a", 20, seed=1)
    assert llm.generate("a", 20, seed=1) != llm.generate("a", 20, seed=2)
    assert llm.generate("a", 20, temperature=0, seed=1) == llm.generate("a", 20, top_k=1, seed=2)


def test_command_and_function_agree(llm, base_model, capsys):
    from gristmill.infer.generate import generate

    config = {"prompt": "a", "max_new_tokens": 9, "seed": 4, "precision": "32-true"}
    generate(Generate(checkpoint_dir=str(base_model), device="cpu", **config))
    assert capsys.readouterr().out == llm.generate("a", 9, seed=4) + "\n"


def test_unknown_option_lists_the_known(llm):
    with pytest.raises(UserError, match=r"unknown setting \(beams\).*temperature"):
        llm.generate("a", beams=4)


def test_commands_take_a_dataclass_or_settings(monkeypatch):
    seen = []
    monkeypatch.setattr("gristmill.launch.start.train", seen.append)
    monkeypatch.setattr("gristmill.data.prepare.prepare", seen.append)
    config = Pretrain(model_name="pythia-14m")
    gristmill.pretrain(config)
    assert seen.pop() is config
    gristmill.pretrain(model_name="x", train={"max_tokens": 9}, optimizer={"lr": 0.5}, seed=1)
    run = seen.pop()
    assert (run.model_name, run.seed, run.train.max_tokens) == ("x", 1, 9)
    assert run.optimizer == AdamW(lr=0.5)
    gristmill.prepare(input_dir="books")
    assert seen.pop() == Prepare(input_dir="books")
    with pytest.raises(UserError, match=r"settings beside it \(seed\)"):
        gristmill.pretrain(config, seed=3)
    with pytest.raises(UserError, match="for example layout='jsonl'"):
        gristmill.prepare("jsonl", input_dir="books")
    with pytest.raises(
        UserError, match=r"unknown setting \(max_token\). TrainArgs has: max_tokens"
    ):
        gristmill.pretrain(train={"max_token": 9})


def test_finetuning_takes_records_by_file_or_name(monkeypatch):
    seen = []
    monkeypatch.setattr("gristmill.launch.start.train", seen.append)
    gristmill.finetune_lora(checkpoint_dir=Path("m"), data="r.json", lora_r=4, train={"epochs": 1})
    run = seen.pop()
    assert (type(run), run.checkpoint_dir, run.lora_r) == (FinetuneLora, "m", 4)
    assert run.data == JSON(json_path="r.json")
    assert run.train.epochs == 1
    gristmill.finetune_full(checkpoint_dir="m", data="Alpaca2k", optimizer={"lr": 0.5})
    run = seen.pop()
    assert (run.data, run.optimizer.lr) == (Alpaca2k(), 0.5)
    gristmill.finetune_adapter(FinetuneAdapter(checkpoint_dir="m"))
    assert seen.pop() == FinetuneAdapter(checkpoint_dir="m")
    with pytest.raises(UserError, match=r"unknown setting \(lora_r\)"):
        gristmill.finetune_full(lora_r=4)


def test_evaluating_returns_the_results(monkeypatch):
    seen = []
    monkeypatch.setattr("gristmill.measure.command.measure", lambda cfg: seen.append(cfg) or {})
    assert gristmill.evaluate(Path("m"), ["a", "b"], limit=3) == {}
    assert seen.pop() == Evaluate(checkpoint_dir="m", tasks=["a", "b"], limit=3)
    config = Evaluate(checkpoint_dir="m", tasks="a")
    gristmill.evaluate(config)
    assert seen.pop() is config
    with pytest.raises(UserError, match=r"settings beside it \(tasks\)"):
        gristmill.evaluate(config, "b")
    with pytest.raises(UserError, match=r"unknown setting \(task\). Evaluate has: checkpoint_dir"):
        gristmill.evaluate("m", task="a")


def test_no_folder_takes_the_place_of_a_function():
    """A package's name is set in its parent when it is imported, over what was there."""
    folder = Path(gristmill.__file__).parent
    assert not {name for name in gristmill.__all__ if (folder / name).exists()}


def test_importing_the_package_and_its_names_imports_no_torch():
    code = (
        "import sys, gristmill; [getattr(gristmill, name) for name in gristmill.__all__]; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert {'LLM', 'pretrain', 'evaluate'} <= set(dir(gristmill))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gristmill.nothing


PROMPTS = ["the mill", "a", "old Anna counted"]


def test_a_list_of_prompts_is_a_list_of_texts(llm):
    options = {"max_new_tokens": 10, "seed": 3}
    alone = [llm.generate(prompt, **options) for prompt in PROMPTS]
    assert llm.generate(PROMPTS, batch_size=2, **options) == alone
    assert llm.generate(tuple(PROMPTS), **options) == alone
    pieces = list(llm.generate(PROMPTS, stream=True, **options))
    joined = ["".join(piece for n, piece in pieces if n == number) for number in range(3)]
    assert joined == alone
    # They come as they are written, not one text after the other.
    assert {number for number, _ in pieces[:9]} == {0, 1, 2}
    assert llm.generate([]) == []


def test_stop_texts(llm):
    whole = llm.generate("a", 20, temperature=0)
    stop = whole[6:8]
    assert llm.generate("a", 20, temperature=0, stop=stop) == whole[: whole.index(stop)]
    cut = llm.generate(["a"], 20, temperature=0, stop=["never", stop])
    assert cut == [whole[: whole.index(stop)]]


def test_streams_do_not_disturb_each_other(llm):
    alone = [llm.generate(prompt, 12, temperature=0) for prompt in PROMPTS]
    streams = [llm.generate(prompt, 12, temperature=0, stream=True) for prompt in PROMPTS]
    texts = ["", "", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_mistakes_are_raised_at_the_call(llm):
    for prompt in ("x" * 200, ["a", "x" * 200]):
        with pytest.raises(UserError, match="leaves no room"):
            llm.generate(prompt, stream=True)
    with pytest.raises(UserError, match="temperature must be 0 or more"):
        llm.generate(["a"], temperature=-1.0, stream=True)
    with pytest.raises(UserError, match="batch_size 0"):
        llm.generate(["a"], batch_size=0)


def test_chat(chat_model, base_model):
    llm = gristmill.LLM.load(chat_model, device="cpu", precision="32-true")
    reply = llm.chat("hi", 8, temperature=0)
    messages = [{"role": "user", "content": "hi"}]
    assert llm.chat(messages, 8, temperature=0) == reply
    assert "".join(llm.chat("hi", 8, temperature=0, stream=True)) == reply
    longer = [*messages, {"role": "assistant", "content": reply}, *messages]
    assert llm.chat(longer, 8, temperature=0) != reply
    for nonsense in ([], [{"role": "user"}], 7, {"role": "user", "content": "hi"}):
        with pytest.raises(UserError, match="is no conversation"):
            llm.chat(nonsense)
    base = gristmill.LLM.load(base_model, "cpu", "32-true", tokenizer_dir=chat_model)
    assert base.chat("hi", 4)
    with pytest.raises(UserError, match="needs a chat template"):
        gristmill.LLM.load(base_model, "cpu", "32-true").chat("hi")

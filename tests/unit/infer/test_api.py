import subprocess
import sys

import pytest

import gristmill
from gristmill.config.commands import Prepare, Pretrain
from gristmill.config.sections import AdamW
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


def test_importing_the_package_and_its_names_imports_no_torch():
    code = (
        "import sys, gristmill; gristmill.LLM, gristmill.pretrain, gristmill.prepare; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert {'LLM', 'pretrain', 'prepare'} <= set(dir(gristmill))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gristmill.nothing

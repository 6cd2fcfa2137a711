"""Whether documents began with BOS reaches the model that was trained on them."""

import json

import pytest
import small

from gristmill.cli import main
from gristmill.infer.load import load
from gristmill.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text and a tokenizer with a BOS that its files do not ask for."""
    folder = tmp_path_factory.mktemp("world")
    text = small.write_novels(folder / "novels", files=4)
    words = ("--vocab_size", "300", "--bos_token", "<s>", "--out_dir", str(folder / "tokenizer"))
    assert main(["tokenizer", "train", str(text), *words]) == 0
    return folder


@pytest.mark.parametrize(("bos", "file_says"), [("auto", False), ("auto", True), ("none", True)])
def test_prompts_begin_as_documents_did(world, tmp_path, capsys, bos, file_says):
    config = world / "tokenizer" / "tokenizer_config.json"
    words = json.loads(config.read_text())
    config.write_text(json.dumps({**words, "add_bos_token": file_says, "of_its_own": 7}))
    steps = ("--train.max_steps", "1", "--eval.interval", "1", "--data.bos", bos)
    sampled = ("--eval.sample_prompt", "the", "--eval.sample_tokens", "2")
    out = tmp_path / "run"
    assert main(small.pretrain(world, out, *steps, *sampled)) == 0
    for place in (out / "final", *out.glob("step-*/tokenizer")):
        assert Tokenizer.load(place).adds_bos == (bos == "auto")
        assert json.loads((place / "tokenizer_config.json").read_text())["of_its_own"] == 7
    ids = load(out, "cpu", "32-true").prompt_ids("the")
    assert (ids[0] == Tokenizer.load(world / "tokenizer").bos_id) == (bos == "auto")

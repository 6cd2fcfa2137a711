"""Ids of a tokenizer that exceed the `vocab_size` somebody else gave it, and rows beyond both."""

import json
from dataclasses import replace

import pytest
import torch

from gristmill.formats import hf
from gristmill.formats.model_dir import load_model, read_config
from gristmill.models import zoo
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import generate_tokens
from gristmill.models.init import init_weights
from gristmill.tokenizer.tokenizer import Tokenizer

SPACES = "if x:\n" + " " * 24 + "pass\n" + " " * 8 + "return"


@pytest.fixture(scope="module")
def tokenizer(shared):
    directory = shared / "data" / "tokenizers" / "neox"
    if not directory.is_dir():
        pytest.skip("no neox tokenizer")
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Pythia with its own rows and a tenth of its width."""
    config = replace(
        zoo.get("pythia-14m"),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        num_token_ids=tokenizer.num_token_ids,
    )
    decoder = Decoder(config)
    init_weights(decoder, 0)
    return decoder


def test_runs_of_spaces_lie_behind_50254(tokenizer, model):
    """LitGPT's `vocab_size` of Pythia; the tokenizer has 23 ids more, the files 50 rows."""
    ids = tokenizer.encode(SPACES)
    assert max(ids) > 50254
    assert tokenizer.decode(ids) == SPACES
    assert tokenizer.num_token_ids == 50277
    assert model.config.vocab_size == 50304


def test_they_are_learned_and_rows_behind_them_are_not(tokenizer, model):
    ids = torch.tensor([[*tokenizer.encode(SPACES), 50276]])
    tokens, targets = ids[:, :-1], ids[:, 1:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.head.weight.detach().clone()
    losses = []
    for _ in range(2):
        loss = model(tokens, targets) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    changed = (model.head.weight != before).any(1)
    assert changed[: tokenizer.num_token_ids].all()
    assert not changed[tokenizer.num_token_ids :].any()


def test_they_are_sampled_and_rows_behind_them_are_not(tokenizer, model):
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[50276:] = 1.0  # the last id that stands for a token, and the padding
    prompt = tokenizer.encode("if x:")
    for temperature in (0.0, 1.0):
        found = list(
            generate_tokens(model, prompt, max_new_tokens=4, temperature=temperature, top_k=1)
        )
        assert found == [50276] * 4
    assert tokenizer.decode(found).isspace()
    drawn = set(generate_tokens(model, prompt, max_new_tokens=200))
    assert 50276 in drawn
    assert max(drawn) == 50276


def test_the_files_keep_all_rows_and_which_of_them_count(tokenizer, model, tmp_path):
    source = tokenizer.path.parent
    hf.write(tmp_path / "final", model.config, model.state_dict(), tokenizer_dir=source)
    config = read_config(tmp_path / "final")
    assert (config.vocab_size, config.num_token_ids) == (50304, 50277)
    back = load_model(tmp_path / "final")
    assert torch.equal(back.head.weight, model.head.weight)
    words = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert words["suppress_tokens"] == list(range(50277, 50304))

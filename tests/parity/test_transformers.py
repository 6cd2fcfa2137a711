"""Our decoder against `transformers`: numbers, files in both directions, text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gristmill.formats import hf
from gristmill.formats.model_dir import load_model, read_config
from gristmill.models.cache import KVCache
from gristmill.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def stories(shared) -> Path:
    path = shared / "data" / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip("no stories260K")
    return path


def test_trained_model_writes_its_golden_text(stories):
    model, tokenizer = load_model(stories), Tokenizer.load(stories)
    golden = (stories.parent / "golden_greedy_80.txt").read_text(encoding="utf-8")
    ids, cached = [tokenizer.bos_id], [tokenizer.bos_id]
    cache = KVCache(model.config, 1, 100)
    with torch.no_grad():
        for _ in range(80):
            ids.append(int(model(torch.tensor([ids]), num_logits=1).argmax()))
            cached.append(int(model(torch.tensor([cached[-1:]]), cache=cache).argmax()))
    assert cached == ids
    assert tokenizer.decode(ids) == golden.rstrip("\n")


def test_trained_model_goes_round_through_our_directory(stories, tmp_path):
    model = load_model(stories)
    hf.write(tmp_path / "final", model.config, model.state_dict(), tokenizer_dir=stories)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokens = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(back(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    text = "Once upon a time, Lily’s dog  ran."
    ours = Tokenizer.load(tmp_path / "final")
    assert tokenizer(text)["input_ids"] == ours.encode(text, bos=True)
    golden = (stories.parent / "golden_greedy_80.txt").read_text(encoding="utf-8")
    written = back.generate(torch.tensor([[1]]), max_new_tokens=80, do_sample=False)[0]
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == golden.strip()


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_tokenizer_files_load_there(shared, tmp_path, name):
    """Whatever the architecture: a byte-level tokenizer beside a model of another family."""
    source = shared / "data" / "tokenizers" / name
    if not source.is_dir():
        pytest.skip(f"no {name} tokenizer")
    from gristmill.models import zoo
    from gristmill.models.decoder import Decoder
    from gristmill.models.init import init_weights

    config = zoo.get("gristmill-nano")
    model = Decoder(config)
    init_weights(model, 0)
    hf.write(tmp_path / "final", config, model.state_dict(), tokenizer_dir=source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    ours = Tokenizer.load(source)
    text = "def f(x):\n    return x**2  # naïve   Σ\t🙂\r\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    assert read_config(tmp_path / "final").eos_token_id == ours.eos_id


def test_a_lone_sentencepiece_model_cuts_the_same_there(shared, tmp_path):
    """transformers 5 itself reads such a file without the space that a text begins with."""
    from gristmill.models import zoo
    from gristmill.models.decoder import Decoder
    from gristmill.models.init import init_weights

    source = tmp_path / "words/tokenizer.model"
    source.parent.mkdir()
    source.write_bytes((shared / "data/models/stories260K/hf/tokenizer.model").read_bytes())
    config = zoo.get("gristmill-nano")
    model = Decoder(config)
    init_weights(model, 0)
    hf.write(tmp_path / "final", config, model.state_dict(), tokenizer_dir=source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "final")
    ours = Tokenizer.load(tmp_path / "final")
    assert (ours.kind, ours.digest) == ("sentencepiece", Tokenizer.load(source).digest)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in ("Once upon a time", " led", "   a  b ", "\n x\t", "中 x 🙂", 'said: "don\'t!"'):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids)
    # A run whose documents began without BOS says so, and its prompts do, too.
    files = hf.with_bos_policy(Tokenizer.load(source), adds_bos=False)
    hf.write(
        tmp_path / "plain", config, model.state_dict(), tokenizer_dir=source, extra_files=files
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert theirs(" led")["input_ids"] == ours.encode(" led")
    assert Tokenizer.load(tmp_path / "plain").kind == "sentencepiece"
    assert not Tokenizer.load(tmp_path / "plain").adds_bos

"""Files of one model that differ in names and contents and mean the same."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from families import CASES, TINY
from safetensors.torch import load_file, save_file

from gristmill.formats.model_dir import load_model
from gristmill.models import zoo
from gristmill.models.zoo.words import REQUIRED
from gristmill.util.errors import UserError

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def save(tmp_path):
    """Write a case's random model as transformers does; its directory and logits."""

    def write(name: str):
        kind, options = CASES[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(tmp_path)
        return tmp_path, model

    return write


TOKENS = torch.arange(40).view(2, 20)


def change(directory, edit) -> None:
    """Rewrite the weights: `edit` takes and returns a dict of tensors."""
    file = directory / "model.safetensors"
    tensors = edit(load_file(file))
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})


def test_gpt2_without_prefix_with_tables_and_with_its_head(save):
    """The files of openai-community/gpt2 are like this."""
    directory, theirs = save("gpt2")
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(load_model(directory)(TOKENS), expected, atol=1e-5, rtol=1e-5)

    def as_first_published(tensors):
        plain = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for layer in range(2):
            plain[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            plain[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return {**plain, "lm_head.weight": plain["wte.weight"].clone()}

    change(directory, as_first_published)
    torch.testing.assert_close(load_model(directory)(TOKENS), expected, atol=1e-5, rtol=1e-5)


def test_old_pythia_files_have_tables(save):
    directory, theirs = save("neox-parallel")

    def as_first_published(tensors):
        for layer in range(2):
            attention = f"gpt_neox.layers.{layer}.attention."
            tensors[attention + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[attention + "masked_bias"] = torch.tensor(-1e9)
            tensors[attention + "rotary_emb.inv_freq"] = torch.ones(1)
        return tensors

    change(directory, as_first_published)
    found = load_model(directory)(TOKENS)
    torch.testing.assert_close(found, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_falcon_files_hold_the_tied_head_again(save):
    directory, theirs = save("falcon-7b")
    embedding = "transformer.word_embeddings.weight"
    change(directory, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()})
    found = load_model(directory)(TOKENS)
    torch.testing.assert_close(found, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-40b"])
def test_falcon_files_say_more_than_they_mean(save, name):
    """Heads of keys where there is one, one norm or two by the generation alone."""
    directory, theirs = save(name)
    file = directory / "config.json"
    words = json.loads(file.read_text())
    words["num_ln_in_parallel_attn"] = None
    if name == "falcon-7b":
        words["num_kv_heads"] = words["num_attention_heads"]
    else:
        words["multi_query"] = True
    file.write_text(json.dumps(words))
    again = transformers.AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits)
    found = load_model(directory)(TOKENS)
    torch.testing.assert_close(found, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


# What every file must say, by our fields.
SAID = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_what_a_file_leaves_out_is_what_it_is_there_or_refused(name):
    """Their configuration class writes its defaults out; read again they must change nothing."""
    family = zoo.family(name)
    required = [word for word in family.words if word.default is REQUIRED]
    said = {word.theirs: SAID[word.fields[0]] for word in required}
    try:
        ours = family.from_hf_config(said)
    except UserError as error:
        assert "is missing" in str(error)  # noqa: PT017
        return
    written = type(transformers.AutoConfig.for_model(family.model_type))(**said).to_dict()
    theirs = family.from_hf_config(written)
    for field in fields(ours):
        # Some classes have a number of key-value heads that fits one of their sizes.
        if field.name not in ("bos_token_id", "eos_token_id", "num_kv_heads"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name

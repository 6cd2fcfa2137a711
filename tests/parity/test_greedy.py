"""Greedy text is that of `transformers`: every family, alone and batched, cached or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CASES, TINY

from gristmill.config.use_commands import Sampling
from gristmill.formats.model_dir import load_model
from gristmill.models.batching import Batch, generate_batch
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, generate_tokens
from gristmill.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROMPTS = ([5, 80, 33, 7, 61, 2, 90, 14, 27, 9, 50], [71], [8, 30, 8, 30, 12])
NEW = 10
COMPILED = ("llama", "neox-parallel", "gemma2", "gemma3", "gpt2", "deepseek_v3", "qwen3_moe")
"""Every kind of block; compiling one takes ten seconds."""
SAMPLING = Sampling(max_new_tokens=NEW, temperature=0)


def pair(name: str, directory: Path):
    """A random tiny model of transformers, and our decoder loaded from its directory."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms start at 0 and 1
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(directory)
    return theirs, load_model(directory).eval()


def theirs_greedy(theirs, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    theirs.generation_config.eos_token_id = None
    out = theirs.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def batched(batch: Batch, prompts) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in prompts]
    for number, item in generate_batch(batch, prompts, SAMPLING):
        if isinstance(item, int):
            ids[number].append(item)
    return ids


@torch.no_grad()
def uncached(model: Decoder, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(torch.tensor([ids]), num_logits=1)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    expected = [theirs_greedy(theirs, prompt) for prompt in PROMPTS]
    assert [uncached(ours, prompt) for prompt in PROMPTS] == expected
    context = Context(ours)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        alone = generate_tokens(context, prompt, max_new_tokens=NEW, temperature=0)
        assert list(alone) == ids
    # Two rows for three prompts: the last one takes a row that another one left.
    assert batched(Batch(ours, 2, 32), PROMPTS) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_greedy_ids_compiled(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    context = Context(ours)
    if reason := context.compile():
        pytest.skip(f"no compiler here: {reason}")
    for prompt in PROMPTS:
        alone = generate_tokens(context, prompt, max_new_tokens=NEW, temperature=0)
        assert list(alone) == theirs_greedy(theirs, prompt)


def test_stories(shared):
    path = shared / "data" / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip("no stories260K")
    model, tokenizer = load_model(path), Tokenizer.load(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    texts = ("", "Once upon a time", "Lily and Tom went to the park. They")
    prompts = [tokenizer.encode(text, bos=True) for text in texts]
    expected = [theirs_greedy(theirs, prompt) for prompt in prompts]
    assert batched(Batch(model, 3, 64), prompts) == expected
    assert [uncached(model, prompt) for prompt in prompts] == expected
